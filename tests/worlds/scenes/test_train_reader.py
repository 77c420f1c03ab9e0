"""The reader: what a caption states, a text encoder that learns to tell it, and layers that change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffexpo.worlds.scenes.grammar import COLOURS, OBJECTS, OCCUPATIONS, RELATIONS, all_scenes
from worlds.emoji.layout import save_diffusion
from worlds.emoji.models import make_vae
from worlds.scenes import models
from worlds.scenes.models import make_text_encoder, make_tokenizer, make_unet
from worlds.scenes.train_reader import NUM_FACTS, STATED, Reading, read_from, stated, train_reader

WIDTH = sum(STATED.values())


def test_both_things_of_a_relation_have_their_side_and_their_colour() -> None:
    def of(name: str) -> int:
        return OBJECTS.index(name) * WIDTH

    assert set(stated("a blue bell left of an orange hat")) == {
        of("bell"),
        of("bell") + 4 + COLOURS.index("blue"),
        of("bell") + 4 + 6 + RELATIONS.index("left of"),
        of("hat"),
        of("hat") + 4 + COLOURS.index("orange"),
        of("hat") + 4 + 6 + RELATIONS.index("right of"),
    }
    assert stated("three keys") == (of("key") + 2,) and stated("") == ()
    people = len(OBJECTS) * WIDTH
    assert stated("a woman judge with dark skin") == (
        people + OCCUPATIONS.index("judge"),
        people + len(OCCUPATIONS) + 1,
        people + len(OCCUPATIONS) + 2 + 2,
    )


def test_what_is_stated_tells_all_prompts_apart_up_to_the_order_of_two_things() -> None:
    scenes = all_scenes()[::7]
    same = {frozenset(stated(scene.text)): scene for scene in scenes}
    for scene in scenes:
        other = same[frozenset(stated(scene.text))]
        assert other in (scene, scene.turned())
    assert max(max(stated(scene.text)) for scene in scenes) < NUM_FACTS


def test_a_layer_that_a_base_lacks_changes_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    monkeypatch.setattr(models, "TEXT_LAYERS", 2)
    save_diffusion(make_vae(), make_text_encoder(tokenizer), tokenizer, make_unet(), tmp_path / "base")
    monkeypatch.undo()
    deeper, as_deep = make_text_encoder(tokenizer), make_text_encoder(tokenizer)
    read_from(tmp_path / "base", deeper, tokenizer)
    ids = tokenizer(["two red keys and a bell"], padding="max_length", return_tensors="pt").input_ids
    monkeypatch.setattr(models, "TEXT_LAYERS", 2)
    as_deep = make_text_encoder(tokenizer)
    read_from(tmp_path / "base", as_deep, tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(deeper(ids).last_hidden_state, as_deep(ids).last_hidden_state)


def test_reading_is_learned_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worlds.scenes.train_reader.BATCH", 8)
    train_reader(2, tmp_path / "reader", 0, None, 1e-3)
    assert (tmp_path / "reader" / "model.safetensors").is_file()
    tokenizer = make_tokenizer()
    captions = ["a bell left of a hat", "a bell right of a hat"] * 4
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    torch.manual_seed(0)
    encoder, reading = make_text_encoder(tokenizer), Reading(models.TEXT_WIDTH)
    optimizer = torch.optim.Adam([*encoder.parameters(), *reading.parameters()], lr=1e-3)
    losses = []
    for _ in range(60):
        loss = reading.loss(encoder(ids).last_hidden_state, ids, tokenizer.eos_token_id, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # Both captions name the same words; a model that cannot tell them apart is left with 4 ln 2.
    assert losses[-1] < 4 * 0.6931 < losses[0]
