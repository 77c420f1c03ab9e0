"""The training loop of the scenes: so many steps, in as many goes as one likes, with the same result.

The state (weights, AdamW's moments, moving average, number of the step) lies in one safetensors file, written
every few minutes; a run that finds it goes on from there. Draws are keyed by the number of the step.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from worlds.emoji.fit import save_tensors

MOMENTS = {"exp_avg": "first", "exp_avg_sq": "second", "momentum_buffer": "momentum"}
"""What the optimisers remember of a parameter, and its name in the state file."""
LEARNING_AFTER = 50
"""Steps after which every parameter has to have moved: time for layers that begin as zero to open the way."""


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: AdamW with betas (0.9, 0.99), gradient norm clipped at 1.

    Args:
        steps: number of updates.
        learning_rate: peak rate, reached after `warmup` steps and falling by a cosine to `final` of it.
        average: decay of the moving average of the weights, which is what is kept.
        muon: rate of Muon in units of AdamW's, for the matrices of the parts named in `fit` (of a convolution
            the one from all it reads to its channels): their updates have singular values of about 1 and
            AdamW's root mean square (Jordan 2024; Liu et al. 2025, arXiv 2502.16982, eq. 4).
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    final: float = 0.02
    average: float = 0.998
    weight_decay: float = 0.0
    muon: float = 2.5
    minutes_between_saves: float = 3.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return (
            self.learning_rate * min(1.0, (step + 1) / self.warmup) * (self.final + (1 - self.final) * cosine)
        )


def group() -> tuple[int, int]:
    """This process's rank and how many train together: those that `torchrun` started, else (0, 1)."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Training:
    """A module with its optimiser and moving average, which can be stored and taken up again."""

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        state: Path,
        matrices_of: str | tuple[str, ...] | None = None,
    ) -> None:
        self.module, self.schedule, self.path = module, schedule, state
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Views of the parameters as matrices, in the same memory.
        self.matrices = {
            name: nn.Parameter(p.detach().flatten(1))
            for name, p in self.parameters.items()
            if matrices_of is not None and name.startswith(matrices_of) and p.ndim > 1
        }
        adamw = torch.optim.AdamW(
            [
                {
                    "params": [p for name, p in self.parameters.items() if name not in self.matrices],
                    "factor": 1.0,
                }
            ],
            lr=schedule.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        self.optimizer_of: dict[str, torch.optim.Optimizer] = dict.fromkeys(self.parameters, adamw)
        if self.matrices:
            groups = [{"params": list(self.matrices.values()), "factor": schedule.muon}]
            muon = torch.optim.Muon(
                groups, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
            self.optimizer_of |= dict.fromkeys(self.matrices, muon)
        self.optimizers = tuple(set(self.optimizer_of.values()))
        self.step = 0
        if state.is_file():
            self._load()

    def update(self, loss: Tensor) -> None:
        """Take one step down the loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * self.schedule.rate(self.step)
        loss.backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for name, matrix in self.matrices.items():
            gradient = self.parameters[name].grad
            matrix.grad = None if gradient is None else gradient.flatten(1)
        for optimizer in self.optimizers:
            optimizer.step()
        for parameter in self.parameters.values():
            parameter.grad = None
        self.step += 1
        weight = 1 - min(self.schedule.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), [p.detach() for p in self.parameters.values()], weight
            )

    def _share_gradients(self) -> None:
        _, world = group()
        if world > 1:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
            dist.all_reduce(flat)
            for gradient, shared in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(shared.view_as(gradient))

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
            tensors |= {f"weight.{name}": parameter, f"average.{name}": self.average[name]}
            moments = self.optimizer_of[name].state[self.matrices.get(name, parameter)]
            tensors |= {f"{MOMENTS[key]}.{name}": moments[key] for key in MOMENTS if key in moments}
        save_tensors(tensors, self.path)

    @torch.no_grad()
    def _load(self) -> None:
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            moments = {
                key: tensors[f"{label}.{name}"].to(parameter.device)
                for key, label in MOMENTS.items()
                if f"{label}.{name}" in tensors
            }
            if "exp_avg" in moments:
                moments["step"] = torch.tensor(float(self.step))
            self.optimizer_of[name].state[self.matrices.get(name, parameter)] = moments


def refuse_still(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """A ValueError names the parameters that are what they were before: no gradient reaches them."""
    if still := [name for name, p in after.items() if torch.equal(before[name], p)]:
        raise ValueError(
            f"{len(still)} of {len(after)} parameters have not moved, {still[0]} for one: no gradient "
            "reaches them; expected that every trained parameter moves"
        )


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    schedule: Schedule,
    state: Path,
    snapshot: Callable[[], None],
    matrices_of: str | tuple[str, ...] | None = None,
) -> None:
    """Train a module to the end of its schedule, from the state in a file where there is one.

    Args:
        name: prefix of the log lines.
        loss_of: called with the number of the step, by which it keys its draws; returns a scalar loss.
        state: safetensors file of the state.
        snapshot: writes the models; called with the averaged weights when the state is saved and at the end.
        matrices_of: matrices whose names begin with this are trained by Muon; by default none.

    Raises:
        ValueError: a parameter never moves (`refuse_still`), after `LEARNING_AFTER` steps.
    """
    training = Training(module, schedule, state, matrices_of)
    before = {name: p.detach().clone() for name, p in training.parameters.items()}
    start = shown = saved = time.monotonic()
    first, running = training.step, 0.0

    def keep() -> None:
        if group()[0] > 0:
            return
        training.save()
        training.swap()
        snapshot()
        training.swap()

    while training.step < schedule.steps:
        loss = loss_of(training.step)
        training.update(loss)
        if training.step - first == LEARNING_AFTER:
            refuse_still(before, training.parameters)
        value = float(loss.detach())
        running = value if running == 0.0 else 0.98 * running + 0.02 * value
        now = time.monotonic()
        if now - shown > 20 and group()[0] == 0:
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
