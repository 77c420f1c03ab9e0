"""PixArt-Sigma: prepared and masked texts, the checkpoint's own solver, no learned variance, biases that change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import NoiseSource, sample
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.types import Conditioning
from tests.contract.transformer_families import T5_TOKENS, build_pixart, build_sd3
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

PLAIN = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": T5_TOKENS}


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart") / "sigma"
    build_pixart(folder, 0)
    return folder


@pytest.fixture
def broken(sigma: Path, tmp_path: Path) -> Path:
    return copy(sigma, tmp_path)


@pytest.mark.parametrize("prompt", ["", "A Cat ", "two dogs and a very long tail that is cut"])
def test_texts_and_masks_are_the_pipelines(sigma: Path, prompt: str) -> None:
    policy, plain = load(sigma), PixArtSigmaPipeline.from_pretrained(sigma)
    with torch.no_grad():
        states, mask, _, _ = plain.encode_prompt(prompt, False, max_sequence_length=T5_TOKENS)
    ours = policy.encode_prompts([prompt]).tensors
    assert torch.equal(ours["encoder_hidden_states"], states)
    assert torch.equal(ours["encoder_attention_mask"], mask)
    assert int(mask.sum()) == min(policy.count_tokens([prompt])[0], T5_TOKENS)


def test_capitals_are_not_seen(sigma: Path) -> None:
    policy = load(sigma)
    one, other = policy.encode_prompts(["A CAT"]), policy.encode_prompts([" a cat"])
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_padding_changes_nothing(sigma: Path) -> None:
    policy = load(sigma)
    text = policy.encode_prompts(["a cat"]).tensors
    wild = dict(text)
    wild["encoder_hidden_states"] = torch.where(
        text["encoder_attention_mask"].bool()[..., None], text["encoder_hidden_states"], 9.0
    )
    x_t, t = noise(policy, 1), torch.tensor([0.5])
    with torch.no_grad():
        plain, other = (policy.predict(x_t, t, Conditioning(given)) for given in (text, wild))
    assert torch.equal(plain, other)


# NumPy 2 warns about how diffusers hands torch tensors to it.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_the_checkpoints_own_solver_draws_the_pipelines_picture(broken: Path) -> None:
    DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2
    ).save_pretrained(str(broken / "scheduler"))
    edit(broken / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    policy, plain = load(broken), PixArtSigmaPipeline.from_pretrained(broken)
    plain.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = plain(
            "a cat",
            latents=noise(policy, 1),
            num_inference_steps=5,
            guidance_scale=4.5,
            height=16,
            width=16,
            output_type="latent",
            **PLAIN,
        ).images

    class Given(NoiseSource):
        def draw(self) -> torch.Tensor:
            return noise(policy, 1)

    ours = sample(
        policy,
        policy.encode_prompts(["a cat"]),
        policy.encode_prompts([""]),
        SamplerConfig(name="dpmpp", steps=5, guidance=4.5),
        Given([torch.Generator()], policy.latent_shape),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, (8, 32)])
def test_networks_with_and_without_a_learned_variance(tmp_path: Path, size: int | tuple[int, int]) -> None:
    for channels in (4, 8):
        folder = tmp_path / str(channels)
        build_pixart(folder, 0, out_channels=channels)
        policy = load(folder, resolution=size)
        height, width = (side * 2 for side in policy.latent_shape[1:])
        calls = network_calls(
            PixArtSigmaPipeline.from_pretrained(folder),
            prompt="a cat",
            latents=noise(policy, 1),
            num_inference_steps=2,
            guidance_scale=1.0,
            height=height,
            width=width,
            **PLAIN,
        )
        for given, output in calls:
            assert output.shape[1] == channels
            t = given["timestep"].double() / 999
            with torch.no_grad():
                ours = policy.predict(given["hidden_states"], t, policy.encode_prompts(["a cat"]))
            assert torch.equal(ours, output[:, :4])


def test_a_file_of_the_older_class_reads_the_same(broken: Path, sigma: Path) -> None:
    file = broken / "transformer" / "config.json"
    older = {
        "_class_name": "Transformer2DModel",
        "double_self_attention": False,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
    }
    edit(file, **older)
    one, other = load(sigma), load(broken)
    text = one.encode_prompts(["a cat"])
    with torch.no_grad():
        assert torch.equal(
            one.predict(noise(one, 1), torch.tensor([0.3]), text),
            other.predict(noise(one, 1), torch.tensor([0.3]), text),
        )


def test_biases_of_keys_change_nothing_and_are_not_trained(sigma: Path) -> None:
    policy = load(sigma, FULL)
    network = policy.weights.network
    inert = inert_parameters(policy)
    assert len(inert) == 4 and not set(inert) & set(policy.weights.trainable())
    sizes = gradient_sizes(policy)
    assert set(sizes) - set(inert) == set(policy.weights.trainable())
    largest_inert = max(sizes[name] for name in inert)
    assert largest_inert < 1e-4 * min(size for name, size in sizes.items() if name not in inert)
    x_t, t, text = noise(policy, 1), torch.tensor([0.5]), policy.encode_prompts(["a cat"])
    with torch.no_grad():
        before = policy.predict(x_t, t, text)
        for name in inert:
            network.get_parameter(name).add_(1.0)
        torch.testing.assert_close(policy.predict(x_t, t, text), before, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(sigma: Path) -> None:
    check_checkpointing(sigma)


def test_what_does_not_fit(sigma: Path, broken: Path, tmp_path: Path) -> None:
    refuse(sigma, ConfigError, "model.drop_t5=true: a PixArtSigmaPipeline has no", drop_t5=True)
    refuse(sigma, ConfigError, "expected multiples of 4", resolution=18)
    build_pixart(
        tmp_path / "alpha", 0, use_additional_conditions=True, num_attention_heads=6, cross_attention_dim=48
    )
    refuse(tmp_path / "alpha", PolicyError, "also fed the image's size.*expected a PixArt-Sigma")
    build_sd3(tmp_path / "sd3", 0, has_t5=True)
    replace(broken, "text_encoder", tmp_path / "sd3" / "text_encoder_3")
    refuse(broken, PolicyError, "gives states of 64, the transformer takes 32")
    replace(broken, "text_encoder", sigma / "text_encoder")
    content = json.loads((tmp_path / "sd3" / SCHEDULER).read_text())
    (broken / SCHEDULER).write_text(json.dumps(content))
    refuse(broken, PolicyError, "describes a 'flow' path, expected 'vp' for a PixArtSigmaPipeline")
