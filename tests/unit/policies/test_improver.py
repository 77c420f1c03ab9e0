"""The improvement model starts as the base bit for bit, learns from its further channels, and is the same after saving."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.guidance import with_image
from diffexpo.errors import MissingError, PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.improver import (
    IMPROVER_FILE,
    Improver,
    load_improver,
    make_improver,
    save_improver,
)
from diffexpo.policies.sd3 import SD3Policy
from diffexpo.policies.toy import ToyPolicy
from diffexpo.policies.unet import UNetPolicy
from tests.learning.toy import PATHS

FAMILIES = ["diffusion_folder", "v_folder", "flow_folder"]


def load(folder: Path, kind: str = "full") -> UNetPolicy | SD3Policy:
    return load_policy(ModelConfig(device="cpu"), TuningConfig(kind=kind), folder_or_id=str(folder), seed=3)


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest) -> UNetPolicy | SD3Policy:
    return load(request.getfixturevalue(request.param))


def inputs(policy: UNetPolicy | SD3Policy, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t, image = torch.randn(2, rows, *policy.latent_shape, generator=generator)
    return x_t, torch.linspace(0.1, 0.9, rows), image


def input_convolution(policy: UNetPolicy | SD3Policy) -> torch.nn.Conv2d:
    return policy.weights.network.get_submodule(policy.card.input_convolution)


def moved(improver: Improver) -> Improver:
    generator = torch.Generator().manual_seed(5)
    state = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in improver.weights.state("current").items()
    }
    improver.weights.load("current", state)
    return improver


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_an_untrained_improver_is_the_base_bit_for_bit(base: UNetPolicy | SD3Policy, scale: float) -> None:
    improver = make_improver(base)
    x_t, t, image = inputs(base)
    texts = base.encode_prompts(["a cat", "", "a dog"])
    with torch.no_grad():
        expected = base.predict(x_t, t, texts)
        assert torch.equal(improver.predict(x_t, t, with_image(texts, scale * image)), expected)
    assert expected.abs().max() > 0


def test_it_starts_from_the_base_whatever_the_policy_has_learned(diffusion_folder: Path) -> None:
    adapted = load(diffusion_folder, "lora")
    plain = make_improver(load(diffusion_folder))
    assert make_improver(adapted).weights.fingerprint("current") == plain.weights.fingerprint("current")
    # Widening draws no random number: the global generator stands where it stood.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make_improver(adapted)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_new_channels_are_zero_and_the_bias_is_the_bases(base: UNetPolicy | SD3Policy) -> None:
    channels = base.latent_shape[0]
    improver = make_improver(base)
    narrow, wide = (input_convolution(policy) for policy in (base, improver))
    assert torch.equal(wide.weight[:, :channels], narrow.weight) and torch.equal(wide.bias, narrow.bias)
    assert not wide.weight[:, channels:].any() and wide.weight.shape[1] == 2 * channels
    config = improver.weights.network.config
    assert (config.in_channels, config.out_channels) == (2 * channels, channels)


def test_the_gradient_reaches_every_tensor_and_the_image_matters_after_a_step(
    base: UNetPolicy | SD3Policy,
) -> None:
    improver = make_improver(base)
    x_t, t, image = inputs(base)
    texts = base.encode_prompts(["a cat", "", "a dog"])
    improver.predict(x_t, t, with_image(texts, image)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in improver.weights.trainable().items()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    wide = input_convolution(improver).weight
    assert wide.grad[:, base.latent_shape[0] :].any()
    with torch.no_grad():
        wide -= 0.1 * wide.grad
        one, other = (improver.predict(x_t, t, with_image(texts, sign * image)) for sign in (1, -1))
    assert not torch.equal(one, other)


def test_the_widened_convolution_is_one_over_all_channels(base: UNetPolicy | SD3Policy) -> None:
    improver = moved(make_improver(base))
    wide = input_convolution(improver)
    both = torch.randn(
        2, wide.in_channels, *base.latent_shape[1:], generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        plain = torch.nn.functional.conv2d(both, wide.weight, wide.bias, wide.stride, wide.padding)
        torch.testing.assert_close(wide(both), plain, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_is_the_same_and_plain_diffusers_reads_it(
    base: UNetPolicy | SD3Policy, tmp_path: Path
) -> None:
    improver = moved(make_improver(base))
    folder = save_improver(
        improver, save_improver(improver, tmp_path / "improver")
    )  # a second time over the first
    again = load_improver(folder, base)
    assert again.weights.fingerprint("current") == improver.weights.fingerprint("current")
    x_t, t, image = inputs(base)
    texts = with_image(base.encode_prompts(["a cat", "", "a dog"]), image)
    with torch.no_grad():
        expected = improver.predict(x_t, t, texts)
        assert torch.equal(again.predict(x_t, t, texts), expected)
    component, network = (
        ("unet", UNet2DConditionModel)
        if isinstance(base, UNetPolicy)
        else ("transformer", SD3Transformer2DModel)
    )
    plain = network.from_pretrained(folder / component).eval()
    assert plain.config.in_channels == 2 * base.latent_shape[0]
    improver.weights._versions["current"] = plain  # our calls, its network
    with torch.no_grad():
        torch.testing.assert_close(improver.predict(x_t, t, texts), expected, rtol=1e-4, atol=1e-4)
    assert {path.name for path in folder.iterdir()} >= {"model_index.json", "vae", "text_encoder", component}


def test_a_scale_of_the_condition_is_part_of_the_folder(diffusion_folder: Path, tmp_path: Path) -> None:
    base = load(diffusion_folder)
    folder = save_improver(moved(make_improver(base)), tmp_path)
    settings = json.loads((folder / IMPROVER_FILE).read_text())
    assert settings["condition_scale"] == 1.0
    (folder / IMPROVER_FILE).write_text(json.dumps(settings | {"condition_scale": 0.5}))
    x_t, t, image = inputs(base)
    texts = base.encode_prompts(["a cat", "", "a dog"])
    with torch.no_grad():
        halved = load_improver(folder, base).predict(x_t, t, with_image(texts, image))
        (folder / IMPROVER_FILE).write_text(json.dumps(settings))
        assert torch.equal(
            load_improver(folder, base).predict(x_t, t, with_image(texts, 0.5 * image)), halved
        )


def test_what_is_no_improver_of_this_model_is_refused(
    diffusion_folder: Path, flow_folder: Path, tmp_path: Path
) -> None:
    base = load(diffusion_folder)
    with pytest.raises(MissingError, match="improver.json"):
        load_improver(diffusion_folder, base)
    folder = save_improver(make_improver(base), tmp_path / "improver")
    with pytest.raises(PolicyError, match="another autoencoder"):
        load_improver(folder, load(flow_folder))
    other = tmp_path / "other"
    shutil.copytree(diffusion_folder, other)
    file = other / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(PolicyError, match="another text_encoder"):
        load_improver(folder, load(other))
    shutil.copytree(diffusion_folder / "unet", folder / "unet", dirs_exist_ok=True)
    with pytest.raises(PolicyError, match="takes 4 channels; expected 8"):
        load_improver(folder, base)
    with pytest.raises(PolicyError, match="ToyPolicy"):
        make_improver(ToyPolicy(PATHS["vp"]))
