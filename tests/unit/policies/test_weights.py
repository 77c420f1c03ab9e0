"""Versions of weights: exact copies, the base untouched, one trainable version, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import PolicyError
from diffexpo.policies.base import load_policy
from diffexpo.policies.toy import TOY_FULL, TOY_LORA, ToyPolicy

Predict = torch.Tensor


@pytest.fixture(params=["unet-lora", "unet-full", "sd3-lora", "sd3-full", "toy-lora", "toy-full"])
def policy(request: pytest.FixtureRequest):
    family, kind = request.param.split("-")
    if family == "toy":
        return ToyPolicy(DiffusionPath.flow(1.0), tuning=TOY_LORA if kind == "lora" else TOY_FULL)
    folder = request.getfixturevalue("diffusion_folder" if family == "unet" else "flow_folder")
    tuning = TuningConfig(kind=kind, lora=LoraConfig(rank=4))
    return load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(folder), seed=0)


def predict(policy, version: str) -> Predict:
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.weights.use(version):
        return policy.predict(x_t, torch.tensor([0.25, 0.75]), policy.encode_prompts(["a cat", "dog"]))


def shake(policy, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_current_reference_and_base_are_equal_at_the_start(policy) -> None:
    base = predict(policy, "base")
    assert torch.equal(predict(policy, "current"), base)
    assert torch.equal(predict(policy, "reference"), base)


def test_training_moves_current_only(policy) -> None:
    base = predict(policy, "base")
    policy.weights.copy("current", "main")
    fingerprint = policy.weights.fingerprint("base")
    shake(policy)
    assert not torch.equal(predict(policy, "current"), base)
    for version in ("base", "reference", "main"):
        assert torch.equal(predict(policy, version), base)
    assert policy.weights.fingerprint("base") == fingerprint != policy.weights.fingerprint("current")


def test_copies_are_exact_and_independent(policy) -> None:
    shake(policy, 1)
    policy.weights.copy("current", "exploration")
    policy.weights.copy("exploration", "main")
    first = predict(policy, "current")
    shake(policy, 2)
    second = predict(policy, "current")
    policy.weights.copy("current", "exploration")
    assert torch.equal(predict(policy, "main"), first)
    assert torch.equal(predict(policy, "exploration"), second)
    parameters = policy.weights.trainable()
    policy.weights.copy("main", "current")
    assert torch.equal(predict(policy, "current"), first)
    assert all(parameters[key] is value for key, value in policy.weights.trainable().items())
    policy.weights.copy("base", "current")
    assert torch.equal(predict(policy, "current"), predict(policy, "base"))
    assert torch.equal(predict(policy, "exploration"), second)


def test_reference_follows_a_copy_and_falls_back_when_dropped(policy) -> None:
    base = predict(policy, "base")
    shake(policy)
    policy.weights.copy("current", "reference")
    assert torch.equal(predict(policy, "reference"), predict(policy, "current"))
    assert torch.equal(predict(policy, "base"), base)
    policy.weights.copy("base", "reference")
    assert torch.equal(predict(policy, "reference"), base)
    policy.weights.copy("current", "reference")
    policy.weights.drop("reference")
    assert torch.equal(predict(policy, "reference"), base)


def test_state_and_load_are_inverse(policy) -> None:
    shake(policy)
    state = policy.weights.state("current")
    policy.weights.load("resumed", state)
    assert torch.equal(predict(policy, "resumed"), predict(policy, "current"))
    assert policy.weights.fingerprint("resumed") == policy.weights.fingerprint("current")
    shake(policy, 5)
    assert not torch.equal(predict(policy, "resumed"), predict(policy, "current"))
    policy.weights.load("current", state)
    assert torch.equal(predict(policy, "resumed"), predict(policy, "current"))
    policy.weights.load("zero", policy.weights.state("base"))
    assert torch.equal(predict(policy, "zero"), predict(policy, "base"))


def test_only_current_is_trained_whatever_ran_in_between(policy) -> None:
    policy.weights.copy("current", "main")
    shake(policy)
    x_t = torch.randn(2, *policy.latent_shape)
    t, conditioning = torch.tensor([0.25, 0.75]), policy.encode_prompts(["a cat", "dog"])
    with policy.weights.use("current"):
        prediction = policy.predict(x_t, t, conditioning)
        with torch.no_grad(), policy.weights.use("reference"), policy.weights.use("main"):
            policy.predict(x_t, t, conditioning)
        with policy.weights.use("base"):
            assert not policy.predict(x_t, t, conditioning).requires_grad
        nested = policy.predict(x_t, t, conditioning)
    assert torch.equal(prediction, nested)
    prediction.square().mean().backward()
    trainable = policy.weights.trainable()
    with_gradient = [
        key for key, value in trainable.items() if value.grad is not None and value.grad.abs().max() > 0
    ]
    assert len(with_gradient) > 0.8 * len(trainable)
    for version in ("base", "reference", "main"):
        with policy.weights.use(version):
            trained = {id(parameter) for parameter in trainable.values()}
            others = [p for p in policy.weights.network.parameters() if id(p) not in trained]
            assert not any(parameter.requires_grad or parameter.grad is not None for parameter in others)


def test_use_restores_after_an_error(policy) -> None:
    shake(policy)
    before = predict(policy, "current")
    with pytest.raises(RuntimeError), policy.weights.use("base"):
        raise RuntimeError
    x_t = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        after = policy.predict(x_t, torch.tensor([0.25, 0.75]), policy.encode_prompts(["a cat", "dog"]))
    assert torch.equal(after, before)


def test_one_version_stands_in_for_all_others(policy) -> None:
    shake(policy)
    trained = predict(policy, "current")
    with policy.weights.standing_in("current"):
        assert torch.equal(predict(policy, "reference"), trained)
        assert torch.equal(predict(policy, "base"), trained)
    assert not torch.equal(predict(policy, "reference"), trained)


def test_refusals_name_what_is_wrong(policy) -> None:
    weights = policy.weights
    with pytest.raises(PolicyError, match="'nobody'.*one of base, current, reference"), weights.use("nobody"):
        pass
    for write in (
        lambda: weights.copy("current", "base"),
        lambda: weights.load("base", weights.state("current")),
        lambda: weights.drop("base"),
    ):
        with pytest.raises(PolicyError, match="'base': never changes"):
            write()
    with pytest.raises(PolicyError, match="in use"):
        weights.drop("current")
    state = weights.state("current")
    key = next(iter(state))
    with pytest.raises(PolicyError, match="1 tensors missing"):
        weights.load("main", {name: tensor for name, tensor in state.items() if name != key})
    with pytest.raises(PolicyError, match="1 unknown.*stranger"):
        weights.load("main", {**state, "stranger": torch.zeros(1)})
    with pytest.raises(PolicyError, match="has shape"):
        weights.load("main", {**state, key: torch.zeros(1, 1, 1)})
    assert "main" not in weights.names()


def test_adapters_off_equals_a_frozen_copy(diffusion_folder: Path) -> None:
    model = ModelConfig(device="cpu")
    full = load_policy(model, TuningConfig(kind="full"), folder_or_id=str(diffusion_folder), seed=0)
    lora = load_policy(model, TuningConfig(kind="lora"), folder_or_id=str(diffusion_folder), seed=0)
    shake(full)
    shake(lora)
    assert torch.equal(predict(lora, "reference"), predict(full, "reference"))
    assert torch.equal(predict(lora, "base"), predict(full, "base"))


def test_lora_scale_is_alpha_over_rank(diffusion_folder: Path) -> None:
    states, changes = [], []
    for alpha in (4.0, 8.0):
        tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=4, alpha=alpha, target_modules=("conv_out",)))
        policy = load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(diffusion_folder), seed=0)
        shake(policy)
        states.append(policy.weights.state("current"))
        changes.append(predict(policy, "current") - predict(policy, "base"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    torch.testing.assert_close(changes[1], 2 * changes[0], rtol=1e-4, atol=1e-6)


def test_lora_factors_depend_on_the_seed_alone(diffusion_folder: Path) -> None:
    def factors(seed: int) -> str:
        policy = load_policy(
            ModelConfig(device="cpu"),
            TuningConfig(kind="lora"),
            folder_or_id=str(diffusion_folder),
            seed=seed,
        )
        return policy.weights.fingerprint("current")

    before = torch.get_rng_state()
    assert factors(1) == factors(1) != factors(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_that_binds_to_nothing_names_the_nearest(diffusion_folder: Path) -> None:
    tuning = TuningConfig(kind="lora", lora=LoraConfig(target_modules=("to_qq", "to_vv")))
    with pytest.raises(PolicyError, match=r"target_modules=\['to_qq', 'to_vv'\].*nearest.*to_q.*to_v"):
        load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(diffusion_folder), seed=0)


def test_lora_on_a_layer_without_factors_is_refused(diffusion_folder: Path) -> None:
    tuning = TuningConfig(kind="lora", lora=LoraConfig(target_modules=("norm1",)))
    with pytest.raises(PolicyError, match=r"target_modules=\['norm1'\].*not supported"):
        load_policy(ModelConfig(device="cpu"), tuning, folder_or_id=str(diffusion_folder), seed=0)
