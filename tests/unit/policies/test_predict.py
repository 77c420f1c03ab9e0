"""The policy is the pipeline: same text states, same network call, same autoencoder, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.policies.base import load_policy
from diffexpo.policies.sd3 import SD3Policy
from diffexpo.policies.unet import UNetPolicy
from diffexpo.types import Conditioning

CPU = ModelConfig(device="cpu")
PROMPTS = ["a cat", "", "two dogs and a very long tail that is cut"]


def load(folder: Path, kind: str = "lora") -> UNetPolicy | SD3Policy:
    return load_policy(CPU, TuningConfig(kind=kind), folder_or_id=str(folder), seed=3)


@pytest.fixture(params=["diffusion_folder", "v_folder"])
def unet_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_unet_calls_equal_the_pipelines(unet_folder: Path) -> None:
    policy = load(unet_folder)
    pipeline = StableDiffusionPipeline.from_pretrained(unet_folder, safety_checker=None)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def record(module: torch.nn.Module, inputs: tuple, kwargs: dict, output: tuple) -> None:
        seen.append((inputs[0], inputs[1], kwargs["encoder_hidden_states"], output[0]))

    pipeline.unet.register_forward_hook(record, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    x_t = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = pipeline(
        PROMPTS, num_inference_steps=3, guidance_scale=2.0, latents=x_t, output_type="latent"
    ).images
    assert len(seen) == 3
    for model_input, timestep, states, prediction in seen:
        t = torch.full((6,), float(timestep) / 999)
        with torch.no_grad():
            ours = policy.predict(model_input, t, Conditioning({"encoder_hidden_states": states}))
        assert torch.equal(ours, prediction)
    with torch.no_grad():
        picture = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.equal(policy.decode_latents(latents), (picture / 2 + 0.5).clamp(0, 1))


def test_sd3_calls_equal_the_pipelines(flow_folder: Path) -> None:
    policy = load(flow_folder)
    pipeline = StableDiffusion3Pipeline.from_pretrained(flow_folder, text_encoder_3=None, tokenizer_3=None)
    seen: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    pipeline.transformer.register_forward_hook(
        lambda module, inputs, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    pipeline.set_progress_bar_config(disable=True)
    x_t = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    # Sigmas whose thousandfold is a float exactly, so that t = timestep / 1000 gives the same timestep again.
    latents = pipeline(
        PROMPTS,
        sigmas=[1.0, 0.75, 0.5],
        guidance_scale=2.0,
        latents=x_t,
        height=16,
        width=16,
        output_type="latent",
    ).images
    assert [float(kwargs["timestep"][0]) for kwargs, _ in seen] == [1000.0, 750.0, 500.0]
    for kwargs, prediction in seen:
        states = kwargs["encoder_hidden_states"]
        assert not states[:, policy.max_tokens :].any()
        conditioning = Conditioning(
            {
                "clip_states": states[:, : policy.max_tokens],
                "pooled_projections": kwargs["pooled_projections"],
            }
        )
        with torch.no_grad():
            ours = policy.predict(kwargs["hidden_states"], kwargs["timestep"] / 1000, conditioning)
        assert torch.equal(ours, prediction)
    config = pipeline.vae.config
    with torch.no_grad():
        picture = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    assert torch.equal(policy.decode_latents(latents), (picture / 2 + 0.5).clamp(0, 1))


def test_unet_text_states_equal_the_pipelines(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    pipeline = StableDiffusionPipeline.from_pretrained(diffusion_folder, safety_checker=None)
    ours = policy.encode_prompts(PROMPTS).tensors["encoder_hidden_states"]
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        assert torch.equal(ours[row], states[0])


def test_sd3_text_states_equal_the_pipelines(flow_folder: Path) -> None:
    policy = load(flow_folder)
    pipeline = StableDiffusion3Pipeline.from_pretrained(flow_folder, text_encoder_3=None, tokenizer_3=None)
    ours = policy.encode_prompts(PROMPTS).tensors
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(
                prompt, None, None, device="cpu", do_classifier_free_guidance=False
            )
        assert torch.equal(ours["clip_states"][row], states[0, : policy.max_tokens])
        assert torch.equal(ours["pooled_projections"][row], pooled[0])


@pytest.mark.parametrize("name", ["diffusion_folder", "flow_folder"])
def test_encoding_is_the_posterior_mean_scaled(name: str, request: pytest.FixtureRequest) -> None:
    policy = load(request.getfixturevalue(name))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = policy.encode_images(images)
    with torch.no_grad():
        posterior = policy.vae.encode(images * 2 - 1).latent_dist
    expected = (posterior.mean - (policy.vae.config.shift_factor or 0.0)) * policy.vae.config.scaling_factor
    assert torch.equal(latents, expected)
    assert tuple(latents.shape[1:]) == policy.latent_shape
    decoded = policy.decode_latents(latents * 50)
    assert decoded.dtype == torch.float32 and float(decoded.min()) >= 0 and float(decoded.max()) <= 1


@pytest.mark.parametrize("name", ["diffusion_folder", "flow_folder"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_loading_twice_gives_the_same_policy(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    torch.manual_seed(1)
    first = load(folder, kind)
    torch.manual_seed(2)
    second = load(folder, kind)
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
    assert first.weights.fingerprint("current") == second.weights.fingerprint("current")
    assert not any(module.training for module in first.weights.network.modules())


def test_tokens_are_counted_before_truncation(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    assert policy.max_tokens == 16
    assert policy.count_tokens(["", "cat", "a cat", "x" * 40]) == [2, 3, 4, 42]
    assert policy.count_tokens([]) == []
    conditioning = policy.encode_prompts(["x" * 40, "x" * 99])
    states = conditioning.tensors["encoder_hidden_states"]
    assert torch.equal(states[0], states[1])


def test_half_precision_base_keeps_float32_adapters(flow_folder: Path) -> None:
    model = ModelConfig(device="cpu", dtype="bfloat16")
    policy = load_policy(model, TuningConfig(kind="lora"), folder_or_id=str(flow_folder), seed=0)
    assert {parameter.dtype for parameter in policy.weights.trainable().values()} == {torch.float32}
    x_t = torch.randn(1, *policy.latent_shape)
    prediction = policy.predict(x_t, torch.tensor([0.5]), policy.encode_prompts(["cat"]))
    assert prediction.dtype == torch.float32 and bool(torch.isfinite(prediction).all())


@pytest.mark.parametrize("name", ["diffusion_folder", "flow_folder"])
def test_gradient_checkpointing_changes_no_gradient(name: str, request: pytest.FixtureRequest) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(
            CPU,
            TuningConfig(kind="lora"),
            folder_or_id=str(request.getfixturevalue(name)),
            seed=0,
            gradient_checkpointing=checkpointing,
        )
        x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        conditioning = policy.encode_prompts(["a cat", "dog"])
        with policy.weights.use("current"):
            prediction = policy.predict(x_t, torch.tensor([0.3, 0.9]), conditioning)
        with torch.no_grad(), policy.weights.use("reference"):
            policy.predict(x_t, torch.tensor([0.3, 0.9]), conditioning)
        prediction.square().mean().backward()
        gradients.append({key: value.grad for key, value in policy.weights.trainable().items()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-5, atol=1e-7)
        if ".lora_B." in key and "add_q" not in key:
            assert float(gradient.abs().max()) > 0, key
