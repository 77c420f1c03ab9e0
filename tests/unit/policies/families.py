"""Helpers of the transformer families' tests: broken copies of folders, and what a pipeline hands to its network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import DiffexpoError
from diffexpo.policies.base import load_policy
from diffexpo.types import Policy

FULL, LORA = TuningConfig(kind="full"), TuningConfig(kind="lora")
SCHEDULER = "scheduler/scheduler_config.json"


def load(
    folder: Path, tuning: TuningConfig = LORA, *, gradient_checkpointing: bool = False, **model: object
) -> Policy:
    return load_policy(
        ModelConfig(device="cpu", **model),
        tuning,
        folder_or_id=str(folder),
        seed=0,
        gradient_checkpointing=gradient_checkpointing,
    )


def refuse(folder: Path, kind: type[DiffexpoError], match: str, **model: object) -> None:
    with pytest.raises(kind, match=match):
        load(folder, **model)


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace(folder: Path, component: str, source: Path) -> None:
    """Another model's component in this one's place."""
    shutil.rmtree(folder / component)
    shutil.copytree(source, folder / component)


def network_calls(pipeline: DiffusionPipeline, **call: object) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Keyword arguments and output of every call of the transformer while the pipeline draws latents."""
    seen: list[tuple[dict[str, Tensor], Tensor]] = []

    def hook(module: torch.nn.Module, inputs: tuple, kwargs: dict, output: tuple) -> None:
        named = dict(zip(("hidden_states",), inputs, strict=False)) | kwargs
        seen.append((named, output[0]))

    handle = pipeline.transformer.register_forward_hook(hook, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline(output_type="latent", **call)
    handle.remove()
    return seen


def noise(policy: Policy, rows: int = 2) -> Tensor:
    return torch.randn(rows, *policy.latent_shape, generator=torch.Generator().manual_seed(0))


def gradient_sizes(policy: Policy) -> dict[str, float]:
    """Largest gradient of every parameter of the network, trained or not, over a few texts and times."""
    network = policy.weights.network.requires_grad_(True)
    x_t = noise(policy, 4)
    weight = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
    conditioning = policy.encode_prompts(["a cat", "", "two dogs", "red"])
    (policy.predict(x_t, torch.tensor([0.1, 0.4, 0.6, 0.9]), conditioning) * weight).sum().backward()
    return {
        name: 0.0 if value.grad is None else float(value.grad.abs().max())
        for name, value in network.named_parameters()
    }


def inert_parameters(policy: Policy) -> tuple[str, ...]:
    """Names of the denoiser's parameters that the family's card calls inert."""
    network = policy.weights.network
    return policy.card.inert_parameters(network.config, dict(network.named_parameters()))


def check_checkpointing(folder: Path) -> None:
    """Recomputed activations give the same gradients, also when another version ran in between."""
    gradients = []
    for is_on in (False, True):
        policy = load(folder, gradient_checkpointing=is_on)
        t, text = torch.tensor([0.3, 0.9]), policy.encode_prompts(["a cat", "dog"])
        prediction = policy.predict(noise(policy), t, text)
        with torch.no_grad(), policy.weights.use("reference"):
            policy.predict(noise(policy), t, text)
        prediction.square().mean().backward()
        gradients.append({name: value.grad for name, value in policy.weights.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)
        assert float(gradient.abs().max()) > 0 or ".lora_A." in name, name
