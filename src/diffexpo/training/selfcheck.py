"""Checks of an iteration's start, on what its first step computes anyway: each finds a fault that would waste
the run, before the weights move."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from diffexpo.errors import TrainingError
from diffexpo.types import Algorithm, Batch, LossOutput, Policy

CHECKED_ROWS = 4
"""Rows that run once more where a policy starts apart from its reference: enough to see margin and loss."""
# On other devices than the CPU the two forwards may use different kernels, which round differently.
INEXACT_TOLERANCE = 1e-2


def check_trainable(parameters: Collection[object]) -> None:
    """Something is trained; else a TrainingError."""
    if not parameters:
        advice = "check tuning.kind, and tuning.lora.target_modules against the model's module names"
        raise TrainingError(f"nothing to train: the policy has 0 trainable tensors; {advice}")


def check_gradients(largest: Mapping[str, float]) -> None:
    """Every trained module has a gradient that is not zero; a TrainingError names those that it misses.

    Args:
        largest: Largest absolute value of each trained tensor's gradient.
    """
    modules = {trained_module(name) for name in largest}
    missed = unreached_modules(largest)
    if len(missed) == len(modules):
        raise TrainingError(
            f"no gradient reaches any of the {len(modules)} trained modules; winners equal to losers, "
            "rewards equal within every prompt, or a loss detached from the policy, cause this"
        )
    if missed:
        shown = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
        reason = f"no gradient reaches {len(missed)} of {len(modules)} trained modules: {shown}"
        advice = "they are not part of the forward pass, so leave them out of tuning.lora.target_modules"
        raise TrainingError(f"{reason}; {advice}")


def unreached_modules(largest: Mapping[str, float]) -> list[str]:
    """Trained modules whose gradient is zero. A low-rank pair counts as one module: at the start
    its up matrix (B) is 0, so that its down matrix (A) rightly has gradient 0."""
    reached: dict[str, bool] = {}
    for name, value in largest.items():
        module = trained_module(name)
        reached[module] = reached.get(module, False) or value != 0
    return [module for module, arrived in reached.items() if not arrived]


def trained_module(name: str) -> str:
    """The module of a trained tensor: the adapted layer of a low-rank matrix, else the tensor itself."""
    return re.split(r"\.lora_[AB]\.", name)[0]


@torch.no_grad()
def measure_against_itself(
    policy: Policy, algorithm: Algorithm, part: Batch, noise_key: tuple[str | int, ...]
) -> dict[str, float]:
    """Loss and metrics of rows with the policy as its own reference, whatever "reference" and "base" hold."""
    with policy.weights.standing_in("current"):
        return mean_values(algorithm.loss(policy, part, noise_key))


def mean_values(output: LossOutput) -> dict[str, float]:
    """The metrics that some row has as means, the loss among them."""
    sums = {name: (float(total), float(count)) for name, (total, count) in output.metrics.items()}
    means = {name: total / count for name, (total, count) in sums.items() if count}
    return means | {"train/loss": float(output.loss)}


def check_agreement(values: Mapping[str, float], expected: float | None, is_exact: bool) -> None:
    """With the policy as its own reference the margin is 0 and the loss the `expected` one, if that is known;
    else a TrainingError says that the reference is another model, that something in the network is random, or
    that current and reference are not measured in the same way.

    Args:
        values: Means of metrics and loss, over rows with policy = reference.
        expected: ln 2 for Diffusion-DPO's sigmoid; None: unknown.
        is_exact: Demand exact zeros (CPU, float32).
    """
    # A reference-free margin (SimPO's) is not 0 at the start; only one that comes with reference errors is.
    if "train/winner_reference_error" in values:
        margin = values["train/margin"]
        if not abs(margin) <= (0.0 if is_exact else INEXACT_TOLERANCE):
            raise TrainingError(
                f"with the policy as its own reference the margin is {margin!r}, expected 0: the reference "
                "is not the model that training starts from, or two forwards with the same weights and "
                "inputs differ; turn off dropout and other randomness in the denoiser"
            )
    loss = values["train/loss"]
    if expected is not None and not abs(loss - expected) <= (1e-6 if is_exact else INEXACT_TOLERANCE):
        reason = f"with the policy as its own reference the loss is {loss!r}, expected {expected!r}"
        advice = "the loss does not measure current and reference in the same way"
        raise TrainingError(f"{reason}; {advice}")
