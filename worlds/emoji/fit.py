"""The training loop that all models of the emoji world share: timed schedule, moving averages, snapshots,
log."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

AUTOCAST = torch.bfloat16  # float32 weights


def choose_device() -> torch.device:
    """Return the device to train on: the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Return the mixed-precision context of all trainings here: bfloat16 matrix products over float32
    weights.

    On a CPU bfloat16 is 1.35x (UNet) to 1.9x (autoencoder) faster with AVX-512 and 14x *slower* without, so
    it is left off there.
    """
    wanted = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device.type, AUTOCAST, enabled=wanted)


class Average:
    """An exponential moving average of a module's parameters, with a warm-up so that early snapshots are
    usable."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights by 1 - min(decay, (1 + n) / (10 + n))."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.module.parameters()], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average's (call twice to come back)."""
        for parameter, value in zip(self.module.parameters(), self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file under a temporary name, then rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


@dataclass(frozen=True)
class Schedule:
    """How a model is trained: AdamW with betas (0.9, 0.99), whose rate follows the elapsed share of the time.

    Args:
        minutes: wall-clock minutes; the schedule spans exactly these.
        learning_rate: peak rate, reached after `warmup` of the time and falling by a cosine to `final` of it.
    """

    minutes: float
    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.02
    final: float = 0.02

    def rate(self, progress: float) -> float:
        """Return the learning rate after the share `progress` of the time."""
        ramp = min(1.0, progress / self.warmup + 0.02)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * ramp * (self.final + (1 - self.final) * cosine)


def fit(
    name: str,
    loss_of: Callable[[float], Tensor],
    parameters: Iterable[nn.Parameter],
    schedule: Schedule,
    *,
    averages: Sequence[Average] = (),
    snapshot: Callable[[], None] | None = None,
    snapshot_minutes: float = 8.0,
) -> int:
    """Train until the time is over.

    Args:
        name: prefix of the log lines.
        loss_of: called with the progress in [0, 1); returns a scalar loss.
        parameters: what to optimise; the gradient norm is clipped at 1.
        averages: updated after every step; swapped in while `snapshot` runs and at the end.
        snapshot: writes the models; called every `snapshot_minutes` and at the end.

    Returns:
        The number of steps taken.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=schedule.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=schedule.weight_decay,
        fused=True,
    )

    def swap() -> None:
        for average in averages:
            average.swap()

    start = logged = saved = time.monotonic()
    total, step, running = schedule.minutes * 60, 0, 0.0
    while (elapsed := time.monotonic() - start) < total:
        rate = schedule.rate(elapsed / total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(elapsed / total)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average in averages:
            average.update()
        step += 1
        value = float(loss.detach())
        running = value if step == 1 else 0.98 * running + 0.02 * value
        now = time.monotonic()
        if now - logged > 20:
            logged = now
            print(
                f"{name}: step {step} loss {running:.4f} lr {rate:.1e} elapsed {now - start:.0f} s "
                f"left {total - (now - start):.0f} s",
                flush=True,
            )
        if snapshot is not None and now - saved > snapshot_minutes * 60:
            saved = now
            swap()
            snapshot()
            swap()
    swap()
    if snapshot is not None:
        snapshot()
    print(f"{name}: finished after {step} steps, loss {running:.4f}", flush=True)
    return step
