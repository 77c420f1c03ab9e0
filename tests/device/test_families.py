"""Every model family on the accelerator: it sees, samples, learns and is exported as on the CPU, where the contract proves the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.diffusion import sample
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import export_policy
from diffexpo.policies.family import FamilyPolicy
from diffexpo.policies.loading import choose_device
from tests.contract.family import Family
from tests.contract.test_contract import FAMILIES, PROMPT, FixedNoise, noise, random

# The same kernels but for attention, which torch composes on the device: sums of some ten float32 terms in another order, through a few
# layers. What stands on the wrong side, in the wrong type or order is wrong in the first digit.
TOLERANCE = 2e-4
# NumPy 2 warns about how the solver that a folder may name hands torch tensors to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def load(family: Family, folder: Path, device: str) -> FamilyPolicy:
    tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=4, target_modules=family.lora_targets))
    policy = load_policy(ModelConfig(device=device), tuning, folder_or_id=str(folder), seed=0)
    assert isinstance(policy, FamilyPolicy)
    return policy


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return float((found.cpu() - expected).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_family_does_on_the_device_what_it_does_on_the_cpu(
    family: Family, device: torch.device, tmp_path: Path
) -> None:
    family.build(tmp_path / "model", 0)
    usual, policy = (load(family, tmp_path / "model", name) for name in ("cpu", "auto"))
    assert policy.device == device == choose_device("auto")
    told = {name: value for name, value in policy.encode_prompts([PROMPT, ""]).tensors.items()}
    assert {value.device for value in told.values()} == {device}
    for name, expected in usual.encode_prompts([PROMPT, ""]).tensors.items():
        assert near(told[name].float(), expected.float())

    found = {}
    for one in (usual, policy):
        texts, empty = one.encode_prompts([PROMPT] * 2).to("cpu"), one.encode_prompts([""] * 2).to("cpu")
        drawn = sample(one, texts, empty, random(one, family.guidance), FixedNoise(noise(one, 2)))
        images = one.decode_latents(drawn.cpu())  # as they come back from the store
        target = one.encode_images(images.cpu())
        parameters = list(one.weights.trainable().values())
        with one.weights.use("current"):
            prediction = one.predict(drawn, torch.full((2,), 0.5), texts)
        gradients = torch.autograd.grad((prediction - target.to(prediction)).square().mean(), parameters)
        assert {part.device for part in (drawn, images, target, prediction, *gradients)} == {one.device}
        found[one.device] = (
            drawn,
            images,
            target,
            prediction.detach(),
            torch.cat([part.flatten() for part in gradients]),
        )
    for ours, expected in zip(found[device], found[usual.device], strict=True):
        assert near(ours, expected)
    assert bool((found[device][-1] != 0).any())

    policy.release_text_encoders()
    assert {encoder.device.type for encoder in policy.text_encoders} == {"cpu"}
    done = export_policy(policy, "current", tmp_path / "export")
    assert done["sha256"] == export_policy(usual, "current", tmp_path / "usual")["sha256"]
