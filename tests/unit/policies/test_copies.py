"""A reference in half precision predicts the same bits under autocast; copies in main memory come back as they were."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffexpo.algorithms import algorithm_class
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.copies import CAST_LAYERS, cast_parameters, lower_precision, lowered_bytes
from diffexpo.types import PairBatch, Policy
from tests.contract.family import Family
from tests.contract.transformer_families import FAMILIES as TRANSFORMERS
from tests.contract.unet_families import FAMILIES as UNETS

FAMILIES = {family.name: family for family in (*UNETS, *TRANSFORMERS)}
SHOWN = ("sd15", "sdxl", "sd3_5", "flux_dev", "pixart_sigma")
HALF = TuningConfig(kind="full", reference_dtype="bfloat16")
FULL = TuningConfig(kind="full")


def load(folder: Path, tuning: TuningConfig = HALF) -> Policy:
    return load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(folder), seed=0)


@contextmanager
def bf16() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        yield


def predict(policy: Policy, version: str) -> Tensor:
    x_t = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning = policy.encode_prompts(["a cat", "", "two dogs"])
    with torch.no_grad(), bf16(), policy.weights.use(version):
        return policy.predict(x_t, torch.tensor([0.1, 0.5, 0.9]), conditioning)


def shake(policy: Policy, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def reference(policy: Policy) -> nn.Module:
    with bf16(), policy.weights.use("reference"):
        return policy.weights.network


# torch says of root-mean-square norms under autocast, in float32 as well, that their fused kernel does not serve.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("family", [FAMILIES[name] for name in SHOWN], ids=SHOWN)
def test_it_predicts_the_bits_of_float32_under_autocast(family: Family, tmp_path: Path) -> None:
    family.build(tmp_path, 0)
    half, whole = load(tmp_path), load(tmp_path, FULL)
    expected = predict(whole, "reference")
    assert torch.equal(predict(half, "reference"), expected)
    assert torch.equal(predict(half, "current"), expected)
    # Trained weights as well, which no file has rounded beforehand.
    for policy in (half, whole):
        shake(policy)
        policy.weights.copy("current", "reference")
    moved = predict(whole, "reference")
    assert not torch.equal(moved, expected)
    assert torch.equal(predict(half, "reference"), moved) and torch.equal(predict(half, "current"), moved)


def test_half_of_everything_is_another_model(diffusion_folder: Path) -> None:
    """The reason why norms stay in float32: autocast does not cast their weights."""
    policy = load(diffusion_folder, FULL)
    shake(policy)
    policy.weights.copy("current", "reference")
    expected = predict(policy, "current")
    network = reference(policy)
    lower_precision(network, torch.bfloat16)
    assert torch.equal(predict(policy, "reference"), expected)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.data = module.weight.data.bfloat16().float()
    assert not torch.equal(predict(policy, "reference"), expected)


def test_what_autocast_casts_takes_half_and_nothing_else_does(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    before = policy.weights.fingerprint("base")
    network = reference(policy)
    lowered = {id(parameter) for parameter in cast_parameters(network)}
    for name, parameter in network.named_parameters():
        owner = network.get_submodule(name.rpartition(".")[0])
        assert (
            (parameter.dtype == torch.bfloat16) == (type(owner) in CAST_LAYERS) == (id(parameter) in lowered)
        )
    held = sum(value.numel() * value.element_size() for value in network.parameters())
    assert held == lowered_bytes(policy.weights.base_module, torch.bfloat16)
    assert held < 0.55 * sum(4 * value.numel() for value in network.parameters())
    # The base is what it was, and what versions are made from.
    assert policy.weights.fingerprint("base") == before
    assert {value.dtype for value in policy.weights.base_module.parameters()} == {torch.float32}
    policy.weights.copy("base", "main")
    assert policy.weights.fingerprint("main") == before


@pytest.mark.parametrize("tuning", [HALF, FULL], ids=["half", "float32"])
def test_the_loss_starts_at_ln_2_exactly(diffusion_folder: Path, tuning: TuningConfig) -> None:
    policy = load(diffusion_folder, tuning)
    draw = torch.Generator().manual_seed(1)
    latents = [torch.randn(3, *policy.latent_shape, generator=draw) for _ in range(2)]
    batch = PairBatch(*latents, policy.encode_prompts(["a", "b", "c"]), ("1", "2", "3"))
    settings = DiffusionDpoConfig(beta=5000.0, empty_prompt_fraction=0.0)
    algorithm = algorithm_class("diffusion_dpo")(settings, policy.encode_prompts([""]))
    with bf16():
        output = algorithm.loss(policy, batch, (0, "test"))
        assert output.loss.item() == torch.tensor(math.log(2.0)).item()
        assert float(output.metrics["train/margin"][0]) == 0.0
        shake(policy)
        assert algorithm.loss(policy, batch, (0, "test")).loss.item() != output.loss.item()


def test_equal_losses_and_gradients_with_either_reference(diffusion_folder: Path) -> None:
    found = []
    for tuning in (HALF, FULL):
        policy = load(diffusion_folder, tuning)
        shake(policy)
        draw = torch.Generator().manual_seed(1)
        latents = [torch.randn(2, *policy.latent_shape, generator=draw) for _ in range(2)]
        batch = PairBatch(*latents, policy.encode_prompts(["a", "b"]), ("1", "2"))
        settings = DiffusionDpoConfig(beta=50.0, empty_prompt_fraction=0.0)
        algorithm = algorithm_class("diffusion_dpo")(settings, policy.encode_prompts([""]))
        with bf16():
            loss = algorithm.loss(policy, batch, (0, "test")).loss
        loss.backward()
        found.append([loss.detach(), *(value.grad for value in policy.weights.trainable().values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_follows_copies_and_falls_back_to_the_base(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    weights, base = policy.weights, predict(policy, "reference")
    shake(policy)
    weights.copy("current", "main")
    shake(policy, 1)
    for source in ("current", "main", "base"):
        weights.copy(source, "reference")
        assert torch.equal(predict(policy, "reference"), predict(policy, source)), source
    weights.load("reference", weights.state("current"))
    assert torch.equal(predict(policy, "reference"), predict(policy, "current"))
    weights.drop("reference")
    assert torch.equal(predict(policy, "reference"), base)


def test_it_runs_under_its_own_autocast_only_and_is_never_a_source(diffusion_folder: Path) -> None:
    policy = load(diffusion_folder)
    weights = policy.weights
    with pytest.raises(PolicyError, match="under autocast of that type only"), weights.use("reference"):
        pass
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(PolicyError, match="held in bfloat16"),
        weights.use("reference"),
    ):
        pass
    for target in ("current", "main"):
        with pytest.raises(
            PolicyError, match="'reference': held in bfloat16, so its exact values are not here"
        ):
            weights.copy("reference", target)
    with weights.use("base"):
        assert weights.network is weights.base_module


@pytest.mark.parametrize("kind", ["half", "parked"])
def test_states_files_and_fingerprints_are_those_of_float32(diffusion_folder: Path, kind: str) -> None:
    tuning = HALF if kind == "half" else TuningConfig(kind="full", reference_device="cpu")
    policy, plain = load(diffusion_folder, tuning), load(diffusion_folder, FULL)
    for one in (policy, plain):
        shake(one)
        one.weights.copy("current", "main")
        one.weights.copy("base", "reference")
        one.weights.load("old", one.weights.state("main"))
    for version in ("base", "current", "main", "old"):
        assert policy.weights.fingerprint(version) == plain.weights.fingerprint(version)
        assert torch.equal(predict(policy, version), predict(plain, version))
    assert policy.weights.names() == plain.weights.names()


needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="moves between main memory and an accelerator"
)


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["cpu", "same"])
def test_parked_copies_are_on_the_device_while_they_run(
    diffusion_folder: Path, where: str, dtype: str
) -> None:
    tuning = TuningConfig(kind="full", reference_dtype=dtype, reference_device=where)
    policy = load_policy(ModelConfig(device="cuda"), tuning, folder_or_id=str(diffusion_folder), seed=0)
    weights = policy.weights
    weights.copy("current", "main")

    def places(version: str) -> set[str]:
        return {value.device.type for value in weights._versions[version].parameters()}

    before = weights.fingerprint("base")
    for version in ("base", "main", "reference"):
        with torch.autocast("cuda", dtype=torch.bfloat16), weights.use(version):
            assert places(version) == {"cuda"}
            with weights.use("current"), weights.use(version):
                assert places(version) == places("current") == {"cuda"}
    parked = {"base", "main", "reference"} if where == "cpu" else {"base"} if dtype == "bfloat16" else set()
    for version in ("base", "main", "reference"):
        assert places(version) == ({"cpu"} if version in parked else {"cuda"}), version
    with pytest.raises(RuntimeError), weights.use("base"):
        raise RuntimeError
    assert weights.fingerprint("base") == before
