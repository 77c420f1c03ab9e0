"""The training loop of the scenes: so many steps, in as many goes as one likes, with the same result.

The state (weights, AdamW's moments, moving average, number of the step) lies in one safetensors file, written
every few minutes; a run that finds it goes on from there. Draws are keyed by the number of the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from worlds.emoji.fit import save_tensors


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: AdamW with betas (0.9, 0.99), gradient norm clipped at 1.

    Args:
        steps: number of updates.
        learning_rate: peak rate, reached after `warmup` steps and falling by a cosine to `final` of it.
        average: decay of the moving average of the weights, which is what is kept.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    final: float = 0.02
    average: float = 0.998
    weight_decay: float = 0.0
    minutes_between_saves: float = 3.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (
            self.learning_rate * min(1.0, (step + 1) / self.warmup) * (self.final + (1 - self.final) * cosine)
        )


class Training:
    """A module with its optimiser and moving average, which can be stored and taken up again."""

    def __init__(self, module: nn.Module, schedule: Schedule, state: Path) -> None:
        self.module, self.schedule, self.path = module, schedule, state
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=schedule.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        self.step = 0
        if state.is_file():
            self._load()

    def update(self, loss: Tensor) -> None:
        """Take one step down the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        weight = 1 - min(self.schedule.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [p.detach() for p in self.parameters.values()], weight
            )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average's (call twice to come back)."""
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)

    def save(self) -> None:
        """Write the state."""
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors |= {
                f"weight.{name}": parameter,
                f"average.{name}": self.average[name],
                f"first.{name}": moments["exp_avg"],
                f"second.{name}": moments["exp_avg_sq"],
            }
        save_tensors(tensors, self.path)

    @torch.no_grad()
    def _load(self) -> None:
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
            }


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    state: Path,
    snapshot: Callable[[], None],
) -> None:
    """Train a module to the end of its schedule, from the state in a file where there is one.

    Args:
        name: prefix of the log lines.
        loss_of: called with the number of the step, by which it keys its draws; returns a scalar loss.
        state: safetensors file of the state.
        snapshot: writes the models; called with the averaged weights when the state is saved and at the end.
    """
    training = Training(module, schedule, state)
    start = shown = saved = time.monotonic()
    first, running = training.step, 0.0

    def keep() -> None:
        training.save()
        training.swap()
        snapshot()
        training.swap()

    while training.step < schedule.steps:
        loss = loss_of(training.step)
        training.update(loss)
        value = float(loss.detach())
        running = value if running == 0.0 else 0.98 * running + 0.02 * value
        now = time.monotonic()
        if now - shown > 20:
            shown = now
            left = (now - start) / (training.step - first) * (schedule.steps - training.step)
            print(
                f"{name}: step {training.step} of {schedule.steps}, loss {running:.4f}, "
                f"{now - start:.0f} s, CPU {time.process_time():.0f} s, left {left:.0f} s",
                flush=True,
            )
        if now - saved > 60 * schedule.minutes_between_saves:
            saved = now
            keep()
    keep()
    training.swap()
    print(f"{name}: finished, loss {running:.4f}, CPU {time.process_time():.0f} s", flush=True)
