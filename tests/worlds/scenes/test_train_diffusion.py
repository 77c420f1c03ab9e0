"""The diffusion base: it is saved as a pipeline, and may start from one with another vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffexpo.rewards.scenes import find_sprites, load_checker, scene_facts
from diffexpo.worlds.scenes.compose import ASSETS
from diffexpo.worlds.scenes.grammar import parse_scene
from worlds.emoji.layout import save_diffusion
from worlds.emoji.models import make_vae
from worlds.scenes.models import learn_merges, make_text_encoder, make_tokenizer, make_unet
from worlds.scenes.train_diffusion import (
    ExchangedScenes,
    LatentScenes,
    exchange,
    exchanged,
    order_error,
    start_from,
    train_diffusion,
)


def test_a_base_is_trained_saved_and_started_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = make_vae()
    train_diffusion(1, tmp_path / "first", 0, vae, None, num_images=16)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "first", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("three red keys", num_inference_steps=1, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    tokenizer = make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    start_from(tmp_path / "first", text_encoder, tokenizer, unet)
    kept = pipeline.text_encoder.float().get_input_embeddings().weight
    assert torch.equal(text_encoder.get_input_embeddings().weight, kept)
    assert torch.equal(next(unet.parameters()), next(pipeline.unet.float().parameters()))


def test_words_keep_their_meaning_in_another_vocabulary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    fewer = type(tokenizer)(
        vocab={
            token: row for row, token in enumerate(sorted(tokenizer.get_vocab())[::2] + ["<|endoftext|>"])
        },
        merges=[],
    )
    old = make_text_encoder(fewer)
    save_diffusion(make_vae(), old, fewer, unet, tmp_path / "old")
    start_from(tmp_path / "old", text_encoder, tokenizer, unet)
    table, before = (model.get_input_embeddings().weight for model in (text_encoder, old))
    for token, row in fewer.get_vocab().items():
        if token in tokenizer.get_vocab():
            # Weights are stored in float16: 11 bits of a table whose entries are about 0.02.
            assert torch.allclose(table[tokenizer.get_vocab()[token]], before[row], atol=1e-4)


def test_the_vocabulary_is_always_the_same_with_one_token_for_a_word() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    # "l" before the last "l" is twice there, all else once, so that the alphabet decides.
    assert learn_merges(["bell", "ball"]) == [
        ("l", "l</w>"),
        ("a", "ll</w>"),
        ("b", "all</w>"),
        ("b", "e"),
        ("be", "ll</w>"),
    ]
    text = "three red keys left of a woman police officer with medium skin"
    assert len(tokenizer(text).input_ids) == len(text.split()) + 2


def test_draws_of_latents_and_captions_are_keyed() -> None:
    torch.manual_seed(0)
    vae = make_vae()
    data = LatentScenes(vae, 32, 0)
    rng, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
    latents, captions = data.draw(16, rng, noise)
    assert latents.shape == (16, 8, 8, 8) and len(captions) == 16
    again, same = data.draw(16, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert torch.equal(latents, again) and captions == same


def test_exchanged_scenes_show_what_both_captions_say() -> None:
    images, scenes = exchanged(12, 0)
    checker, _ = load_checker("checker_train", str(ASSETS / "checker_train"))
    findings = [
        find_sprites(checker, torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[0] for image in images
    ]
    for index, (scene, other) in enumerate(scenes):
        assert scene_facts(findings[index], scene).all and scene_facts(findings[index + 12], other).all
        assert not scene_facts(findings[index], other).all
        assert not scene.is_heldout and not other.is_heldout
        assert [(s.y, s.x) for s in findings[index].sprites] != [] and len(findings[index].sprites) == len(
            findings[index + 12].sprites
        )
    assert any(first.relation for first, _ in scenes) and any(not first.relation for first, _ in scenes)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("a blue bell left of a red hat", "a blue bell right of a red hat"),
        ("two blue bells and a red hat", "two blue hats and a red bell"),
        ("two bells and a hat", "two hats and a bell"),
        ("a blue bell and a red hat", "a blue hat and a red bell"),
        ("a bell and a hat", None),
        ("a blue bell and a blue hat", None),
        ("three blue bells", None),
        ("a judge", None),
    ],
)
def test_an_exchange_changes_what_is_asked_for_or_is_none(text: str, other: str | None) -> None:
    found = exchange(parse_scene(text))
    assert (found and found.text) == other


def test_the_order_error_asks_for_the_difference_only() -> None:
    x0, common = torch.randn(6, 8, 8, 8).double(), torch.randn(3, 8, 8, 8).double()
    assert float(order_error(x0 + torch.cat([common, common]), x0)) < 1e-20
    apart = torch.full((3, 8, 8, 8), 0.5).double()
    assert float(order_error(x0 + torch.cat([apart, -apart]), x0)) == pytest.approx(1.0, abs=1e-12)


def test_captions_of_a_pair_are_exchanges_of_each_other() -> None:
    torch.manual_seed(0)
    data = ExchangedScenes(make_vae(), 12, 0)
    latents, captions = data.draw(40, np.random.default_rng(0))
    assert latents.shape == (80, 8, 8, 8)
    for first, second in zip(captions[:40], captions[40:], strict=True):
        other = exchange(parse_scene(first))
        assert other is not None and other.text == second
    colours = [any(thing.colour for thing in parse_scene(first).things) for first in captions[:40]]
    assert any(colours) and not all(colours)
