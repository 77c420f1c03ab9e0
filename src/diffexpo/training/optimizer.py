"""The optimiser of one iteration: AdamW with its state as named tensors, warm-up, average and loss scale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from diffexpo.config.schema import TrainingConfig
from diffexpo.errors import ResumeError

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""AdamW's state: kind -> parameter name -> tensor, as `optimizer_tensors` gives it."""


def make_optimizer(parameters: Iterable[Parameter], settings: TrainingConfig) -> torch.optim.AdamW:
    """A fresh AdamW. The fused form works element by element, so it is bit-reproducible."""
    # AdamW refuses an empty list; the start-up check says the same in words that help.
    trained = list(parameters) or [Parameter(torch.zeros(0))]
    return torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=all(parameter.device.type in FUSED_DEVICES for parameter in trained),
    )


def learning_rate(step: int, steps: int, settings: TrainingConfig) -> float:
    """Linear warm-up over the first share of the steps, then constant.

        lr(step) = learning_rate * min(1, (step + 1) / max(1, round(warmup_fraction * steps)))

    `step` counts those done before this one, from 0, of the iteration's `steps`. With warmup_fraction 0.25
    and 8 steps the rates are 1/2, 1, 1, ... of learning_rate.
    """
    warmup = max(1, round(settings.warmup_fraction * steps))
    return settings.learning_rate * min(1.0, (step + 1) / warmup)


def optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Parameter]
) -> dict[str, dict[str, Tensor]]:
    """AdamW's state by kind and parameter name; empty before the first step."""
    return {
        f"adamw_{kind}": {
            name: optimizer.state[parameter][kind]
            for name, parameter in parameters.items()
            if parameter in optimizer.state
        }
        for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def load_optimizer(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Parameter], tensors: OptimizerState
) -> None:
    """Put saved state back; ResumeError if it belongs to other parameters."""
    saved = {name: value.shape for name, value in tensors["adamw_exp_avg"].items()}
    expected = {name: value.shape for name, value in parameters.items()}
    if saved and saved != expected:
        odd = min(set(saved.items()) ^ set(expected.items()))[0]
        raise ResumeError(
            f"the checkpoint's optimiser state has {len(saved)} tensors and the model {len(expected)}, "
            f"different at {odd!r}; resume with the configuration that wrote it"
        )
    kinds = [kind for kind in tensors if kind.startswith("adamw_")]
    state = {
        index: {kind.removeprefix("adamw_"): tensors[kind][name] for kind in kinds}
        for index, name in enumerate(parameters)
        if name in saved
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Average:
    """Moving average of the trained tensors: average <- decay * average + (1 - decay) * current."""

    def __init__(self, parameters: Mapping[str, Parameter], decay: float) -> None:
        self.decay = decay
        self._parameters = [parameter.detach() for parameter in parameters.values()]
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self) -> None:
        torch._foreach_lerp_(list(self.tensors.values()), self._parameters, 1.0 - self.decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


@dataclass
class LossScale:
    """Keeps float16 gradients in range: halved after an overflow, doubled after `interval` good steps."""

    value: float = 1.0
    is_dynamic: bool = False
    good_steps: int = 0
    interval: int = 2000

    def accept(self) -> None:
        """Count a finite step."""
        self.good_steps += 1
        if self.is_dynamic and self.good_steps >= self.interval:
            self.value, self.good_steps = self.value * 2.0, 0

    def reject(self) -> bool:
        """Count a step that was not finite. True if a smaller scale may cure it."""
        self.good_steps = 0
        if not self.is_dynamic or self.value <= 1.0:
            return False
        self.value /= 2.0
        return True
