"""Stable Diffusion 3 and 3.5: T5 in use, left out or broken; the shift that follows from the size."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffexpo.data.prompts import filter_long
from diffexpo.diffusion import sampler_grid
from diffexpo.diffusion.guidance import IMAGE_CONDITION
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.policies.improver import load_improver, make_improver, save_improver
from diffexpo.types import Conditioning, Prompt
from tests.contract.transformer_families import T5_TOKENS, build_flux, build_sd3
from tests.unit.policies.families import (
    FULL,
    SCHEDULER,
    check_checkpointing,
    copy,
    edit,
    gradient_sizes,
    inert_parameters,
    load,
    network_calls,
    noise,
    refuse,
    replace,
)

PROMPTS = ["a cat", "two dogs and a very long tail that is cut"]
VARIANTS = {
    "plain": partial(build_sd3, has_t5=True),
    "normed": partial(build_sd3, has_t5=True, qk_norm="rms_norm"),
    "dual": partial(build_sd3, has_t5=True, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by kind."""
    root = tmp_path_factory.mktemp("sd3")
    for name, build in VARIANTS.items():
        build(root / name, 0)
    return {name: root / name for name in VARIANTS}


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    return copy(folders["plain"], tmp_path)


def test_dropping_t5_is_the_pipeline_without_it(folders: dict[str, Path]) -> None:
    with_t5, without = load(folders["plain"]), load(folders["plain"], drop_t5=True)
    plain = StableDiffusion3Pipeline.from_pretrained(folders["plain"], text_encoder_3=None, tokenizer_3=None)
    x_t = noise(without)
    calls = network_calls(
        plain,
        prompt=PROMPTS,
        sigmas=[1.0, 0.75, 0.5],
        latents=x_t,
        height=16,
        width=16,
        guidance_scale=1.0,
        max_sequence_length=T5_TOKENS,
    )
    for given, output in calls:
        t = given["timestep"] / 1000
        with torch.no_grad():
            ours = without.predict(given["hidden_states"], t, without.encode_prompts(PROMPTS))
            other = with_t5.predict(given["hidden_states"], t, with_t5.encode_prompts(PROMPTS))
        # Two texts at once in the pipeline, each alone here: the encoders' kernels may round by their batch.
        torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-5)
        assert float((other - output).abs().max()) > 1e-3
    assert len(without.text_encoders) == 2 and without.fingerprint != with_t5.fingerprint


def test_t5_states_stand_behind_clips(folders: dict[str, Path]) -> None:
    policy = load(folders["plain"])
    plain = StableDiffusion3Pipeline.from_pretrained(folders["plain"])
    for prompt in ["", *PROMPTS]:
        with torch.no_grad():
            states, _, pooled, _ = plain.encode_prompt(
                prompt, None, None, "cpu", 1, False, max_sequence_length=T5_TOKENS
            )
        ours = policy.encode_prompts([prompt]).tensors
        width = ours["clip_states"].shape[-1]
        assert torch.equal(ours["clip_states"], states[:, : policy.clip_tokens, :width])
        assert not states[:, : policy.clip_tokens, width:].any()
        assert torch.equal(ours["t5_states"], states[:, policy.clip_tokens :])
        assert torch.equal(ours["pooled_projections"], pooled)


def test_the_number_of_tokens_is_the_settings_the_files_or_the_pipelines(
    folders: dict[str, Path], broken: Path
) -> None:
    def count(folder: Path, **model: object) -> tuple[int, int]:
        policy = load(folder, **model)
        return policy.sequence_length, policy.encode_prompts(["a cat"]).tensors["t5_states"].shape[1]

    assert count(folders["plain"]) == (T5_TOKENS, T5_TOKENS)
    assert count(folders["plain"], max_sequence_length=7) == (7, 7)
    (broken / "diffexpo.json").unlink()
    assert count(broken) == (256, 256)
    assert load(broken, drop_t5=True).sequence_length == 256
    (broken / "diffexpo.json").write_text(json.dumps({"max_sequence_length": "many"}))
    refuse(broken, PolicyError, "max_sequence_length='many'; expected an integer from 0 to 512")


def test_too_long_is_what_t5_cuts(folders: dict[str, Path]) -> None:
    policy = load(folders["plain"])
    # The tokenizer makes one token of a letter, one of a gap before a word, and an end mark.
    texts = {"xyz": 5, "b" * (T5_TOKENS - 2): T5_TOKENS, "b" * (T5_TOKENS - 1): T5_TOKENS + 1}
    assert policy.count_tokens(list(texts)) == list(texts.values())
    prompts = [Prompt(id=text, text=text) for text in texts]
    kept, dropped = filter_long(prompts, policy.count_tokens, policy.max_tokens)
    assert [len(prompt.text) for prompt in kept] == [3, T5_TOKENS - 2]
    assert [len(prompt.text) for prompt in dropped] == [T5_TOKENS - 1]
    # Without T5 it is what CLIP cuts: 16 tokens with both marks.
    without = load(folders["plain"], drop_t5=True)
    assert without.max_tokens == 16 and without.count_tokens(["b" * 14, "b" * 15]) == [16, 17]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_the_gradient_reaches_all_but_the_inert(folders: dict[str, Path], name: str) -> None:
    policy = load(folders[name], FULL)
    inert = inert_parameters(policy)
    trained = set(policy.weights.trainable())
    for parameter, size in gradient_sizes(policy).items():
        is_inert = parameter.startswith(inert)
        assert (size == 0) == is_inert, f"{parameter}: {size}"
        assert (parameter in trained) != is_inert


def test_gradient_checkpointing_changes_no_gradient(folders: dict[str, Path]) -> None:
    check_checkpointing(folders["dual"])


def test_an_improvement_model_reads_t5_too(folders: dict[str, Path], tmp_path: Path) -> None:
    base, without = load(folders["plain"]), load(folders["plain"], drop_t5=True)
    improver = make_improver(base)
    x_t, t = noise(base, 1), torch.tensor([0.6])
    text = improver.encode_prompts(["a cat"])
    shown = Conditioning({**text.tensors, IMAGE_CONDITION: noise(base, 1)})
    with torch.no_grad():
        assert torch.equal(improver.predict(x_t, t, shown), base.predict(x_t, t, text))
    folder = save_improver(improver, tmp_path / "improver")
    load_improver(folder, base)
    with pytest.raises(PolicyError, match="trained with another text_encoder"):
        load_improver(folder, without)


@pytest.mark.parametrize("size", [16, (16, 8)])
def test_dynamic_shifting_gives_the_pipelines_levels(broken: Path, size: int | tuple[int, int]) -> None:
    edit(broken / SCHEDULER, use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    policy = load(broken, resolution=size)
    height, width = (side * 2 for side in policy.latent_shape[1:])
    calls = network_calls(
        StableDiffusion3Pipeline.from_pretrained(broken),
        prompt="a cat",
        num_inference_steps=4,
        latents=noise(policy, 1),
        height=height,
        width=width,
        guidance_scale=1.0,
        max_sequence_length=T5_TOKENS,
    )
    theirs = torch.cat([given["timestep"] for given, _ in calls])
    ours = torch.tensor([step.t * 1000 for step in sampler_grid(policy.path, "flow_euler", 4)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)
    fixed = sampler_grid(load(broken, resolution=8).path, "flow_euler", 4)
    assert abs(fixed[1].t - float(ours[1]) / 1000) > 1e-3, "the size changes nothing"


def test_t5_named_and_not_there(broken: Path) -> None:
    shutil.rmtree(broken / "text_encoder_3")
    refuse(broken, MissingError, "component 'text_encoder_3' is missing.*model.drop_t5=true")
    assert load(broken, drop_t5=True).text_encoders[2:] == ()


def test_t5_without_its_tokenizer(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = broken / "tokenizer_3" / "tokenizer.json"
    content = file.read_text()
    file.write_text("{}")
    refuse(broken, PolicyError, "tokenizer_3: T5TokenizerFast cannot be loaded")
    file.unlink()
    refuse(broken, MissingError, "tokenizer_3/tokenizer.json: file is missing")
    (broken / "tokenizer_3" / "spiece.model").write_bytes(b"pieces")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse(broken, MissingError, "holds spiece.model and no tokenizer.json.*sentencepiece")
    monkeypatch.undo()
    file.write_text(content)
    load(broken)
    shutil.rmtree(broken / "tokenizer_3")
    refuse(broken, MissingError, "component 'tokenizer_3' is missing")


def test_t5_of_another_model(broken: Path, tmp_path: Path) -> None:
    build_flux(tmp_path / "flux", 0, is_distilled=False)
    replace(broken, "text_encoder_3", tmp_path / "flux" / "text_encoder_2")
    refuse(broken, PolicyError, "text_encoder_3 gives states of 32, the transformer takes 64")
    edit(broken / "text_encoder_3" / "config.json", vocab_size=3)
    refuse(broken, PolicyError, "text_encoder_3")


def test_a_tokenizer_with_more_tokens_than_the_encoder(broken: Path) -> None:
    file = broken / "tokenizer_3" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] += [[f"word{index}", -9.0] for index in range(50)]
    file.write_text(json.dumps(content))
    refuse(broken, PolicyError, r"tokenizer_3: has the token .*, and its text encoder knows \d+")


def test_a_transformer_of_another_family(broken: Path, tmp_path: Path) -> None:
    build_flux(tmp_path / "flux", 0, is_distilled=True)
    replace(broken, "transformer", tmp_path / "flux" / "transformer")
    refuse(broken, PolicyError, "transformer.*belong together|transformer: .* weights are missing")


def test_settings_of_t5_for_a_family_without_it(diffusion_folder: Path) -> None:
    refuse(
        diffusion_folder, ConfigError, "model.drop_t5=true: a StableDiffusionPipeline has no T5", drop_t5=True
    )
    refuse(diffusion_folder, ConfigError, "model.max_sequence_length=77.*null", max_sequence_length=77)


def test_t5_that_would_read_nothing(folders: dict[str, Path]) -> None:
    refuse(folders["plain"], ConfigError, "model.max_sequence_length=0: T5 would", max_sequence_length=0)
    policy = load(folders["plain"], drop_t5=True, max_sequence_length=0)
    conditioning = policy.encode_prompts(["a cat"])
    assert policy.predict(noise(policy, 1), torch.tensor([0.5]), conditioning).isfinite().all()


def test_more_patches_than_positions(folders: dict[str, Path]) -> None:
    refuse(folders["plain"], ConfigError, "positions for 8 in each direction", resolution=[16, 64])


def test_another_scheduler(broken: Path) -> None:
    edit(broken / SCHEDULER, _class_name="DDIMScheduler")
    refuse(broken, PolicyError, "describes a 'vp' path, expected 'flow'")
