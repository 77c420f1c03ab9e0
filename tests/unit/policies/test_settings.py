"""Resolution, precision, memory and speed of a loaded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.data.latents import PromptEmbeddings, image_sizes
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.unet import UNetPolicy
from diffexpo.policies.weights import check_compiler, compile_blocks


def load(folder: Path, kind: str = "lora", **model: object) -> UNetPolicy:
    return load_policy(
        ModelConfig(device="cpu", **model), TuningConfig(kind=kind), folder_or_id=str(folder), seed=0
    )


def predict(policy: UNetPolicy, version: str = "current") -> Tensor:
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.weights.use(version):
        return policy.predict(x_t, torch.tensor([0.2, 0.9]), policy.encode_prompts(["a cat", ""]))


# ---- resolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "latents"),
    [(None, (8, 8)), (16, (8, 8)), (32, (16, 16)), ((16, 24), (8, 12)), ((10, 6), (5, 3))],
)
def test_latents_follow_the_resolution(
    diffusion_folder: Path, resolution: int | tuple[int, int] | None, latents: tuple[int, int]
) -> None:
    policy = load(diffusion_folder, resolution=resolution)
    assert policy.latent_shape == (4, *latents)
    height, width = image_sizes(policy)[0]
    assert (height, width) == (2 * latents[0], 2 * latents[1])
    encoded = policy.encode_images(torch.rand(1, 3, height, width))
    assert tuple(encoded.shape[1:]) == policy.latent_shape
    assert predict(policy).shape == (2, *policy.latent_shape)


@pytest.mark.parametrize(("resolution", "nearest"), [(17, r"\[16, 16\]"), ((16, 25), r"\[16, 24\]")])
def test_a_resolution_that_does_not_divide_is_refused(
    diffusion_folder: Path, resolution: object, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=rf"model.resolution=.*multiples of 2.*nearest is {nearest}"):
        load(diffusion_folder, resolution=resolution)


def test_a_checkpoint_without_a_size_asks_for_one(diffusion_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(diffusion_folder, tmp_path / "model"))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": None}))
    with pytest.raises(PolicyError, match="no sample_size; set model.resolution"):
        load(folder)
    assert load(folder, resolution=16).latent_shape == (4, 8, 8)


# ---- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_of_the_networks_and_not_of_the_autoencoder(
    diffusion_folder: Path, dtype: str
) -> None:
    policy = load(diffusion_folder, dtype=dtype)
    assert policy.weights.network.dtype == policy.text_encoder.dtype == getattr(torch, dtype)
    assert policy.vae.dtype == torch.float32
    latents = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.decode_latents(latents), load(diffusion_folder).decode_latents(latents))


def test_an_overflow_in_half_precision_says_what_to_do(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder, dtype="float16")
    latents = torch.zeros(3, *policy.latent_shape)
    latents[1, 0, 0, 0] = torch.inf
    with pytest.raises(
        PolicyError, match="model.dtype=float16.*in 1 of 3 images.*Set model.dtype to bfloat16"
    ):
        policy.decode_latents(latents)


def test_a_picture_that_is_not_finite_in_float32_is_left_to_the_scorers(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    latents = torch.full((1, *policy.latent_shape), torch.nan)
    assert bool(policy.decode_latents(latents).isnan().any())


# ---- memory -------------------------------------------------------------------------------------------------------


def test_slices_change_no_picture_beyond_rounding(diffusion_folder: Path) -> None:
    plain, sliced = load(diffusion_folder), load(diffusion_folder, vae_slicing=True)
    assert sliced.vae.use_slicing and not plain.vae.use_slicing
    latents = torch.randn(3, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    # Some ten layers in float32, whose sums of a few hundred terms lose about 1e-6 each.
    torch.testing.assert_close(
        sliced.decode_latents(latents), plain.decode_latents(latents), rtol=0, atol=5e-5
    )
    images = plain.decode_latents(latents)
    torch.testing.assert_close(sliced.encode_images(images), plain.encode_images(images), rtol=0, atol=5e-5)


def test_tiles_are_for_pictures_above_the_autoencoders_size(diffusion_folder: Path) -> None:
    plain, tiled = load(diffusion_folder), load(diffusion_folder, vae_tiling=True)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(1, 4, 8, 8, generator=generator)
    assert torch.equal(tiled.decode_latents(small), plain.decode_latents(small))
    large = torch.randn(1, 4, 24, 16, generator=generator)
    assert tiled.decode_latents(large).shape == (1, 3, 48, 32)
    assert not torch.equal(tiled.decode_latents(large), plain.decode_latents(large))


def test_text_encoders_come_back_to_the_policys_device(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    moves: list[torch.device] = []
    move = policy.text_encoder.to
    policy.text_encoder.to = lambda device: moves.append(device) or move(device)  # type: ignore[method-assign]
    policy.release_text_encoders()
    assert policy.encode_prompts(["a cat"]).tensors["encoder_hidden_states"].device.type == "cpu"
    assert moves == [], "nothing to move where the policy's device is main memory"
    # The meta device stands for an accelerator.
    policy.device = torch.device("meta")
    states = policy.encode_prompts(["a cat"]).tensors["encoder_hidden_states"]
    assert moves == [policy.device] and states.device == policy.device


def test_text_encoders_are_released_once_all_prompts_are_encoded(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    released: list[int] = []
    embeddings = PromptEmbeddings(policy)
    policy.release_text_encoders = lambda: released.append(len(embeddings))  # type: ignore[method-assign]
    embeddings.add(["a", "b"])
    embeddings.select(["a"])
    assert released == [2]


# ---- speed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_channels_last_changes_rounding_only(diffusion_folder: Path, kind: str) -> None:
    plain, other = load(diffusion_folder, kind), load(diffusion_folder, kind, channels_last=True)
    weight = other.weights.network.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(predict(other), predict(plain), rtol=0, atol=5e-5)
    assert predict(other).is_contiguous()
    # Versions made later have the layout too, so that equal weights predict equally; files and fingerprints do not.
    other.weights.copy("current", "main")
    assert torch.equal(predict(other, "main"), predict(other, "current"))
    assert all(tensor.is_contiguous() for tensor in other.weights.state("main").values())
    assert other.weights.fingerprint("main") == plain.weights.fingerprint("current")


def test_channels_last_changes_the_rounding_of_the_autoencoder_only(diffusion_folder: Path) -> None:
    plain, other = load(diffusion_folder), load(diffusion_folder, channels_last=True)
    weight = other.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    latents = torch.randn(3, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    images = plain.decode_latents(latents)
    torch.testing.assert_close(other.decode_latents(latents), images, rtol=0, atol=5e-5)
    torch.testing.assert_close(other.encode_images(images), plain.encode_images(images), rtol=0, atol=5e-5)


def test_channels_last_is_for_unets(flow_folder: Path) -> None:
    with pytest.raises(ConfigError, match="model.channels_last=true: SD3Transformer2DModel is no UNet"):
        load(flow_folder, channels_last=True)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_precision_of_inference_is_that_of_forwards_without_gradient(
    diffusion_folder: Path, kind: str
) -> None:
    plain = load(diffusion_folder, kind)
    assert torch.equal(predict(load(diffusion_folder, kind, inference_precision="no")), predict(plain))
    fast = load(diffusion_folder, kind, inference_precision="bf16")
    expected, found = predict(plain), predict(fast)
    # bfloat16 has steps of 2^-8; some layers deep that is a few hundredths of the prediction's size.
    assert 0 < float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert found.dtype == torch.float32 and torch.equal(predict(fast), found)
    # Equal weights predict equally, and what is trained is as before.
    assert torch.equal(predict(fast, "reference"), found)
    trained = [with_gradient(policy) for policy in (plain, fast)]
    assert torch.equal(*trained) and torch.equal(trained[0], expected)


def with_gradient(policy: UNetPolicy) -> Tensor:
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.predict(x_t, torch.tensor([0.2, 0.9]), policy.encode_prompts(["a cat", ""])).detach()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_blocks_predict_the_same_in_every_version(diffusion_folder: Path, kind: str) -> None:
    """With a backend that traces and generates no code: the graphs must be those of the network."""
    policy = load(diffusion_folder, kind)
    expected = predict(policy)
    compile_blocks(policy.weights, backend="eager")
    policy.weights.copy("current", "main")
    with torch.no_grad():
        next(iter(policy.weights.trainable().values())).add_(0.5)
    for version in ("main", "base", "current"):
        with policy.weights.use(version):
            named = [(type(module).__name__, module) for module in policy.weights.network.modules()]
        blocks = [module for name, module in named if name == "BasicTransformerBlock"]
        assert blocks and all(block._compiled_call_impl is not None for block in blocks), version
    torch.testing.assert_close(predict(policy, "main"), expected)
    torch.testing.assert_close(predict(policy, "base"), expected)
    if kind == "full":
        assert not torch.equal(predict(policy, "current"), expected)
    torch._dynamo.reset()


def test_compiling_on_the_cpu_is_refused_with_the_reason(diffusion_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="model.compile=blocks on the CPU.*differ by rounding.*expected off"
    ):
        load(diffusion_folder, compile="blocks")


def test_an_accelerator_without_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="needs Triton on device cuda:0.*set model.compile=off"):
        check_compiler(torch.device("cuda:0"))
