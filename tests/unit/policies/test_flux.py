"""FLUX.1: packing, guidance as a number and true guidance, the schedule, half precision, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from diffexpo.assembly.objects import warn_of_guidance
from diffexpo.cli.progress import Console
from diffexpo.config import load_config
from diffexpo.config.schema import LoraConfig, SamplerConfig, TuningConfig
from diffexpo.diffusion import NoiseSource, sample, sampler_grid
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.policies.flux import CARD, FluxPolicy, image_positions, packed, unpacked
from tests.contract.transformer_families import T5_TOKENS, build_flux, build_sd3, unpack_flux
from tests.tiny import _vae
from tests.unit.policies.families import (
    FULL,
    SCHEDULER,
    check_checkpointing,
    copy,
    edit,
    gradient_sizes,
    load,
    network_calls,
    noise,
    refuse,
    replace,
)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "dev"
    build_flux(folder, 0, is_distilled=True)
    return folder


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "schnell"
    build_flux(folder, 0, is_distilled=False)
    return folder


@pytest.fixture
def broken(dev: Path, tmp_path: Path) -> Path:
    return copy(dev, tmp_path)


def call_of(policy: FluxPolicy, steps: int = 3) -> dict[str, object]:
    """Arguments of a pipeline's call for one picture from `noise`."""
    height, width = (side * 2 for side in policy.latent_shape[1:])
    return {
        "prompt": "a cat",
        "latents": packed(noise(policy, 1).to(policy.dtype)),
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "max_sequence_length": T5_TOKENS,
    }


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 16, 4, 10)])
def test_packing_is_the_pipelines(shape: tuple[int, ...]) -> None:
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tokens = packed(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, *shape))
    assert torch.equal(unpacked(tokens, *shape[2:]), latents)
    assert torch.equal(unpacked(tokens, *shape[2:]), unpack_flux(tokens, shape[1:]))
    theirs = FluxPipeline._prepare_latent_image_ids(
        1, shape[2] // 2, shape[3] // 2, torch.device("cpu"), torch.float32
    )
    assert torch.equal(image_positions(*shape[2:]), theirs)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_the_guidance_number_is_the_pipelines_guidance_scale(dev: Path, scale: float | None) -> None:
    policy = load(dev) if scale is None else load(dev, guidance_embedding=scale)
    plain = FluxPipeline.from_pretrained(dev)
    chosen = {} if scale is None else {"guidance_scale": scale}
    calls = network_calls(plain, **call_of(policy), **chosen)
    assert policy.guidance_embedding == (3.5 if scale is None else scale)
    text = policy.encode_prompts(["a cat"])
    for (given, output), step in zip(calls, sampler_grid(policy.path, "flow_euler", 3), strict=True):
        assert given["guidance"].tolist() == [policy.guidance_embedding]
        x_t = unpack_flux(given["hidden_states"], policy.latent_shape)
        with torch.no_grad():
            ours = policy.predict(x_t, torch.tensor([step.t]), text)
        theirs = unpack_flux(output, policy.latent_shape)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_guidance_number_matters_where_the_network_takes_it(dev: Path, schnell: Path) -> None:
    def velocity(folder: Path, number: float) -> torch.Tensor:
        policy = load(folder, guidance_embedding=number)
        with torch.no_grad():
            return policy.predict(noise(policy, 1), torch.tensor([0.5]), policy.encode_prompts(["a cat"]))

    assert float((velocity(dev, 1.0) - velocity(dev, 7.0)).abs().max()) > 1e-3
    assert torch.equal(velocity(schnell, 1.0), velocity(schnell, 7.0))
    assert load(schnell).guidance_embedding is None


def test_guidance_that_the_pipeline_leaves_off_is_said(dev: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["explore.sampler.guidance=1", "evaluation.sampler.guidance=4"]
    # Nothing is drawn for training, so that the scales need not agree.
    config = load_config([], [*settings, "explore.iterations=1"], {}).config
    warn_of_guidance(config, load(dev), Console())
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert "evaluation.sampler.guidance = 4:" in said and "explore.sampler" not in said


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_classifier_free_guidance_is_true_cfg(name: str, request: pytest.FixtureRequest) -> None:
    policy = load(request.getfixturevalue(name))
    plain = FluxPipeline.from_pretrained(request.getfixturevalue(name))
    plain.set_progress_bar_config(disable=True)
    call = call_of(policy, 4)
    with torch.no_grad():
        theirs = plain(**call, negative_prompt="red", true_cfg_scale=3.0, output_type="latent").images

    class Given(NoiseSource):
        def draw(self) -> torch.Tensor:
            return noise(policy, 1)

    ours = sample(
        policy,
        policy.encode_prompts(["a cat"]),
        policy.encode_prompts(["red"]),
        SamplerConfig(name="flow_euler", steps=4, guidance=3.0),
        Given([torch.Generator()], policy.latent_shape),
    )
    torch.testing.assert_close(ours, unpack_flux(theirs, policy.latent_shape), rtol=1e-4, atol=1e-5)


def test_half_precision_rounds_the_time_as_the_pipeline_does(dev: Path) -> None:
    policy = load(dev, dtype="bfloat16")
    plain = FluxPipeline.from_pretrained(dev, dtype=torch.bfloat16)
    calls = network_calls(plain, **call_of(policy, 5))
    timesteps = plain.scheduler.timesteps
    # Of these, most have no exact bfloat16.
    assert int((timesteps.bfloat16().float() != timesteps).sum()) >= 3
    text = policy.encode_prompts(["a cat"])
    for (given, output), timestep in zip(calls, timesteps.double(), strict=True):
        x_t = unpack_flux(given["hidden_states"], policy.latent_shape)
        with torch.no_grad():
            ours = policy.predict(x_t, (timestep / 1000)[None], text)
        assert torch.equal(ours, unpack_flux(output, policy.latent_shape))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("size", [16, (8, 32)])
def test_the_levels_are_the_pipelines(dev: Path, size: int | tuple[int, int], steps: int) -> None:
    policy = load(dev, resolution=size)
    calls = network_calls(FluxPipeline.from_pretrained(dev), **call_of(policy, steps))
    theirs = torch.cat([given["timestep"] for given, _ in calls])
    ours = torch.tensor([step.t for step in sampler_grid(policy.path, "flow_euler", steps)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_size_is_the_autoencoders_or_the_pipelines(dev: Path, broken: Path) -> None:
    assert load(dev).latent_shape == (4, 8, 8)
    assert load(dev, resolution=(8, 32)).latent_shape == (4, 4, 16)
    file = broken / "vae" / "config.json"
    content = json.loads(file.read_text())
    del content["sample_size"]
    file.write_text(json.dumps(content))
    assert load(broken).latent_shape == (4, 128, 128)
    refuse(dev, ConfigError, "expected multiples of 4", resolution=18)


def test_adapters_go_to_both_streams_unless_told_otherwise(dev: Path) -> None:
    names = [name.split(".lora_")[0] for name in load(dev).weights.trainable()]
    for target in CARD.lora_targets:
        assert any(name.endswith(f".{target}") for name in names), target
    assert any(name.startswith("single_transformer_blocks.1.") for name in names)
    chosen = TuningConfig(kind="lora", lora=LoraConfig(target_modules=("to_q",)))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in load(dev, chosen).weights.trainable()} == {
        "to_q"
    }


def test_the_gradient_reaches_everything(dev: Path, schnell: Path) -> None:
    for folder in (dev, schnell):
        policy = load(folder, FULL)
        sizes = gradient_sizes(policy)
        assert not [name for name, size in sizes.items() if size == 0]
        assert set(policy.weights.trainable()) == set(sizes)


def test_gradient_checkpointing_changes_no_gradient(dev: Path) -> None:
    check_checkpointing(dev)


def test_what_does_not_fit(broken: Path, dev: Path, tmp_path: Path) -> None:
    refuse(dev, ConfigError, "model.drop_t5=true: a FluxPipeline has no text states but T5's", drop_t5=True)
    build_sd3(tmp_path / "sd3", 0, has_t5=True)
    replace(broken, "text_encoder_2", tmp_path / "sd3" / "text_encoder_3")
    refuse(broken, PolicyError, "pooled 32 and states 64, the transformer takes 32 and 32")
    replace(broken, "text_encoder_2", dev / "text_encoder_2")
    shutil.rmtree(broken / "vae")
    _vae(8, 0.1).save_pretrained(str(broken / "vae"))
    refuse(broken, PolicyError, "takes 16 and gives 16 channels.*of the autoencoder are 32")
    replace(broken, "vae", dev / "vae")
    edit(broken / SCHEDULER, _class_name="DDIMScheduler")
    refuse(broken, PolicyError, "describes a 'vp' path, expected 'flow' for a FluxPipeline")
    edit(broken / "model_index.json", _class_name="FluxFillPipeline")
    refuse(broken, PolicyError, "'FluxFillPipeline' is unknown; expected one of")
