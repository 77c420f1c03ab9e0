"""Cheap checks before the first step of an iteration: each finds a fault that would waste the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from diffexpo.errors import TrainingError
from diffexpo.types import Algorithm, Batch, LossOutput, Policy, WeightSets

# On other devices than the CPU the two forwards may use different kernels, which round differently.
INEXACT_TOLERANCE = 1e-2


def check_start(
    policy: Policy,
    algorithm: Algorithm,
    parts: Iterable[Batch],
    noise_key: tuple[str | int, ...],
    *,
    initial_loss: float | None = None,
    autocast: Callable[[], AbstractContextManager[None]],
    is_exact: bool,
) -> None:
    """Check that something is trained, that gradients reach all of it, and that the margin is 0 at the start;
    a TrainingError names what failed and what to do.

    Args:
        parts: Micro-batches of the first step, at least one. The first shows margin and loss; others are
            taken only while some module has no gradient, as a few rows may teach nothing (equal rewards).
        noise_key: As in the first step.
        initial_loss: What the loss must be when current and reference agree (ln 2 for Diffusion-DPO's
            sigmoid); None: unknown.
        is_exact: Demand exact zeros (CPU, float32).
    """
    parameters = policy.weights.trainable()
    if not parameters:
        advice = "check tuning.kind, and tuning.lora.target_modules against the model's module names"
        raise TrainingError(f"nothing to train: the policy has 0 trainable tensors; {advice}")
    first: tuple[Batch, LossOutput] | None = None
    gradients: dict[str, Tensor | None] = {}
    for part in parts:
        with autocast():
            output = algorithm.loss(policy, part, noise_key)
        output.loss.backward()
        first = first or (part, output)
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        if not unreached_modules(gradients):
            break
    for parameter in parameters.values():
        parameter.grad = None
    check_gradients(gradients)
    if not algorithm.settings.needs_reference or first is None:
        return
    part, output = first
    is_apart = algorithm.settings.anchor_version == "base"
    if is_apart or not _same_state(policy.weights, "current", "reference"):
        with policy.weights.standing_in("current"), autocast(), torch.no_grad():
            output = algorithm.loss(policy, part, noise_key)
    check_agreement(output, initial_loss, is_exact)


def check_gradients(gradients: dict[str, Tensor | None]) -> None:
    """Every trained module has a gradient that is not zero; a TrainingError names those that it misses."""
    modules = {trained_module(name) for name in gradients}
    missed = unreached_modules(gradients)
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


def unreached_modules(gradients: dict[str, Tensor | None]) -> list[str]:
    """Trained modules whose gradient is zero or missing. A low-rank pair counts as one module: at the start
    its up matrix (B) is 0, so that its down matrix (A) rightly has gradient 0."""
    reached: dict[str, bool] = {}
    for name, gradient in gradients.items():
        module = trained_module(name)
        # NaN counts as reached: it is reported as a non-finite step, with the step's own message.
        arrived = gradient is not None and bool((gradient != 0).any())
        reached[module] = reached.get(module, False) or arrived
    return [module for module, arrived in reached.items() if not arrived]


def trained_module(name: str) -> str:
    """The module of a trained tensor: the adapted layer of a low-rank matrix, else the tensor itself."""
    return re.split(r"\.lora_[AB]\.", name)[0]


def check_agreement(output: LossOutput, expected: float | None, is_exact: bool) -> None:
    """With the policy as its own reference the margin is 0 and the loss the `expected` one, if that is known;
    else a TrainingError says that something in the network is random, or that current and reference are not
    measured in the same way."""
    # A reference-free margin (SimPO's) is not 0 at the start; only one that comes with reference errors is.
    if "train/winner_reference_error" in output.metrics:
        total, count = output.metrics["train/margin"]
        margin = float(total) / float(count)
        if not abs(margin) <= (0.0 if is_exact else INEXACT_TOLERANCE):
            raise TrainingError(
                f"with the policy as its own reference the margin is {margin!r}, expected 0: two forwards "
                "with the same weights and inputs differ; turn off dropout and other randomness in the "
                "denoiser"
            )
    loss = float(output.loss.detach())
    if expected is not None and not abs(loss - expected) <= (1e-6 if is_exact else INEXACT_TOLERANCE):
        reason = f"with the policy as its own reference the loss is {loss!r}, expected {expected!r}"
        advice = "the loss does not measure current and reference in the same way"
        raise TrainingError(f"{reason}; {advice}")


def _same_state(weights: WeightSets, first: str, second: str) -> bool:
    """Whether two versions agree, where a second in half precision holds the first as autocast rounds it."""
    ours, theirs = weights.state(first), weights.state(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].to(theirs[name].dtype), theirs[name]) for name in ours
    )
