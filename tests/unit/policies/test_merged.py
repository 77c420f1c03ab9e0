"""Adapters folded into the weights: the model that the formula says, and the base's own bits afterwards, whatever happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.errors import PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.unet import UNetPolicy
from diffexpo.policies.weights import fingerprint_state, make_weights

TARGETS = ("to_q", "to_out.0", "conv1", "conv_in", "proj_in")
ADAPTERS = TuningConfig(kind="lora", lora=LoraConfig(rank=4, alpha=6.0, target_modules=TARGETS))


def load(folder: Path, tuning: TuningConfig = ADAPTERS, **model: object) -> UNetPolicy:
    return load_policy(ModelConfig(device="cpu", **model), tuning, folder_or_id=str(folder), seed=0)


def shake(policy: UNetPolicy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def policy(diffusion_folder: Path) -> UNetPolicy:
    """ "main" and "current" with adapters of their own."""
    made = load(diffusion_folder)
    shake(made, 1)
    made.weights.copy("current", "main")
    shake(made, 2)
    return made


def predict(policy: UNetPolicy, dtype: torch.dtype = torch.float32) -> Tensor:
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        return policy.predict(x_t, torch.tensor([0.25, 0.75]), policy.encode_prompts(["a cat", "dog"]))


def drawn_with(policy: UNetPolicy, version: str, *, merged: bool) -> Tensor:
    with policy.weights.use(version, merged=merged):
        return predict(policy)


def bits(policy: UNetPolicy) -> str:
    """Of everything that the network holds, in its place."""
    return fingerprint_state(policy.weights.network.state_dict())


def whole_model(policy: UNetPolicy, folder: Path, version: str) -> UNetPolicy:
    """A float64 network without adapters, with W + alpha / rank B A by NumPy."""
    plain = load(folder, TuningConfig(kind="full"))
    plain.weights.network.double()
    plain.dtype = torch.float64
    factors = {name: value.double().numpy() for name, value in policy.weights.state(version).items()}
    for path in {name.split(".lora_")[0] for name in factors}:
        down, up = factors[f"{path}.lora_A.weight"], factors[f"{path}.lora_B.weight"]
        update = np.einsum("or,ri...->oi...", up.reshape(up.shape[:2]), down)
        plain.weights.network.get_submodule(path).weight.data += 6.0 / 4.0 * torch.from_numpy(update)
    return plain


def test_merged_is_the_base_plus_the_product_of_the_factors(
    policy: UNetPolicy, diffusion_folder: Path
) -> None:
    for version in ("current", "main"):
        expected = predict(whole_model(policy, diffusion_folder, version), torch.float64)
        merged = drawn_with(policy, version, merged=True)
        size = float(expected.abs().max())
        assert float((merged.double() - expected).abs().max()) < 1e-5 * size
        # The update is no rounding error, and the adapters say the same.
        assert float((drawn_with(policy, "base", merged=False).double() - expected).abs().max()) > 1e-2 * size
        torch.testing.assert_close(merged, drawn_with(policy, version, merged=False), rtol=1e-4, atol=1e-5)


def test_an_adapter_without_an_update_and_the_base_are_the_base_bit_for_bit(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    base = drawn_with(policy, "base", merged=False)
    for version in ("base", "reference", "current"):
        assert torch.equal(drawn_with(policy, version, merged=True), base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_merged_in_float32_and_held_in_their_own_type(diffusion_folder: Path, dtype: str) -> None:
    policy = load(diffusion_folder, dtype=dtype)
    shake(policy, 3)
    before = bits(policy)
    factors = policy.weights.trainable()
    assert {value.dtype for value in factors.values()} == {torch.float32}
    layers = dict(policy.weights.network.named_modules())
    paths = sorted({name.split(".lora_")[0] for name in factors})
    originals = {path: layers[path].base_layer.weight.detach().clone() for path in paths}
    with policy.weights.use("current", merged=True):
        for path in paths:
            down, up = (factors[f"{path}.lora_{which}.weight"].detach() for which in "AB")
            weight = layers[path].base_layer.weight
            expected = originals[path].float() + 1.5 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            assert weight.dtype == getattr(torch, dtype) and torch.equal(weight, expected.to(weight.dtype))
    assert bits(policy) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_bases_bits_are_back_after_an_error(policy: UNetPolicy, error: type[BaseException]) -> None:
    before, expected = bits(policy), drawn_with(policy, "current", merged=False)
    with pytest.raises(error), policy.weights.use("main", merged=True):
        assert bits(policy) != before
        raise error
    assert bits(policy) == before
    assert torch.equal(predict(policy), expected)


def test_memory_that_runs_out_while_merging_leaves_what_was_there(
    policy: UNetPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, outer = bits(policy), drawn_with(policy, "main", merged=True)
    made: list[Tensor] = []

    def third_fails(like: Tensor) -> Tensor:
        made.append(like)
        return torch.zeros_like(like) if len(made) < 3 else torch.empty(2**50)

    with policy.weights.use("main", merged=True):
        monkeypatch.setattr("torch.empty_like", third_fails)
        with pytest.raises(RuntimeError, match="can't allocate"), policy.weights.use("current", merged=True):
            pass
        monkeypatch.undo()
        assert torch.equal(predict(policy), outer)
    assert len(made) == 3 and bits(policy) == before


def test_versions_nest_in_any_order(policy: UNetPolicy) -> None:
    alone = {
        (version, merged): drawn_with(policy, version, merged=merged)
        for version in ("main", "current", "base")
        for merged in (False, True)
    }
    assert not torch.equal(alone["main", True], alone["main", False]), "rounded alike: the test shows nothing"
    before = bits(policy)
    for (version, merged), expected in alone.items():
        with policy.weights.use(version, merged=merged):
            for (inner, is_merged), other in alone.items():
                assert torch.equal(drawn_with(policy, inner, merged=is_merged), other)
                assert torch.equal(predict(policy), expected)
            # A version made meanwhile changes nothing either.
            policy.weights.copy("main", "another")
            assert torch.equal(predict(policy), expected)
            policy.weights.drop("another")
            assert torch.equal(predict(policy), expected)
    assert bits(policy) == before


def test_a_version_that_runs_merged_cannot_change(policy: UNetPolicy) -> None:
    weights = policy.weights
    with weights.use("main", merged=True), weights.use("current"):
        for write in (
            lambda: weights.copy("current", "main"),
            lambda: weights.load("main", weights.state("current")),
            lambda: weights.drop("main"),
        ):
            with pytest.raises(PolicyError, match="'main': runs merged"):
                write()
        weights.copy("current", "other")
    weights.copy("current", "main")
    assert torch.equal(drawn_with(policy, "main", merged=True), drawn_with(policy, "other", merged=True))


def test_training_goes_on_after_merged_drawing(policy: UNetPolicy) -> None:
    drawn_with(policy, "current", merged=True)
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    policy.predict(
        x_t, torch.tensor([0.2, 0.8]), policy.encode_prompts(["a", "b"])
    ).square().mean().backward()
    assert all(float(value.grad.abs().max()) > 0 for value in policy.weights.trainable().values())
    trained = {id(value) for value in policy.weights.trainable().values()}
    others = [value for value in policy.weights.network.parameters() if id(value) not in trained]
    assert not any(value.requires_grad or value.grad is not None for value in others)


def test_the_layout_of_weights_is_kept(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder, channels_last=True)
    shake(policy, 1)
    weight = policy.weights.network.conv_in.base_layer.weight
    strides = weight.stride()
    with policy.weights.use("current", merged=True):
        assert weight.stride() == strides and weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_a_convolution_in_groups_is_refused_with_the_reason() -> None:
    """Its update mixes all channels, its weight does not."""
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=2, target_modules=("0", "1")))
    weights = make_weights(network, tuning, 0)
    before = fingerprint_state(network.state_dict())
    with (
        pytest.raises(PolicyError, match="merge_lora=true: 0 is a Conv2d in 2 groups.*target_modules"),
        weights.use("current", merged=True),
    ):
        pass
    assert fingerprint_state(network.state_dict()) == before


def test_copies_have_nothing_to_merge(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder, TuningConfig(kind="full"))
    shake(policy, 1)
    for version in ("current", "base"):
        assert torch.equal(
            drawn_with(policy, version, merged=True), drawn_with(policy, version, merged=False)
        )
