"""What changes while an iteration is trained, the part of it in checkpoints, and the report at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from diffexpo.errors import ResumeError
from diffexpo.training.checkpoint import Checkpoint
from diffexpo.training.optimizer import Average, LossScale, OptimizerState, load_optimizer, optimizer_tensors

TAIL = 50


@dataclass(frozen=True)
class TrainReport:
    """What an iteration did. `tail` holds means over at most the last 50 finite steps, `optimizer_state` the
    optimiser's state at the end by kind and parameter; only `resumed_from` depends on resuming."""

    steps: int
    skipped_steps: int
    resumed_from: int
    tail: dict[str, float]
    optimizer_state: OptimizerState = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """For the metrics file: the tail's means under their own names, with the counts."""
        return self.tail | {"train/steps": self.steps, "train/skipped_steps": self.skipped_steps}


@dataclass
class Progress:
    """State of one iteration's training. Weights are the policy's; the rest is here."""

    iteration: int
    steps: int
    run_seed: int
    parameters: dict[str, Parameter]
    optimizer: torch.optim.AdamW
    average: Average | None
    scale: LossScale
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    saved_at: int = 0
    resumed_from: int = 0
    awaits_check: bool = False
    """Whether the next finite step is the first that moves the weights, and is to be checked."""
    shows_agreement: bool = False
    """Whether policy and reference are the same until then."""
    tail: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=TAIL))

    def state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        names = ("iteration", "step", "run_seed", "skipped", "bad_in_a_row")
        scale = {"loss_scale": self.scale.value, "good_steps": self.scale.good_steps}
        return {name: getattr(self, name) for name in names} | scale | {"tail": list(self.tail)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint other than the weights."""
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        if self.average is not None:
            tensors["average"] = self.average.tensors
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state; ResumeError if it was written with other parameters or without an
        average of the weights."""
        load_optimizer(self.optimizer, self.parameters, checkpoint.tensors)
        if self.average is not None:
            if "average" not in checkpoint.tensors:
                raise ResumeError(
                    f"{checkpoint.path} has no average of the weights but training.ema_decay is "
                    f"{self.average.decay}; resume with the run's own configuration (ema_decay 0)"
                )
            self.average.load(checkpoint.tensors["average"])
        state = checkpoint.state
        self.step = self.saved_at = self.resumed_from = state["step"]
        self.skipped, self.bad_in_a_row = state["skipped"], state["bad_in_a_row"]
        self.scale.value, self.scale.good_steps = state["loss_scale"], state["good_steps"]
        self.tail.extend(state["tail"])

    def tail_means(self) -> dict[str, float]:
        """Mean of each metric over the last finite steps that have it."""
        names = dict.fromkeys(name for row in self.tail for name in row)
        columns = {name: [row[name] for row in self.tail if name in row] for name in names}
        return {name: sum(column) / len(column) for name, column in columns.items()}


def check_identity(checkpoint: Checkpoint, iteration: int, run_seed: int, steps: int) -> None:
    """Refuse a checkpoint of another iteration, seed or length with a ResumeError that names both."""
    state = checkpoint.state
    if (state["iteration"], state["run_seed"]) != (iteration, run_seed) or state["step"] > steps:
        raise ResumeError(
            f"{checkpoint.path} is of iteration {state['iteration']}, seed {state['run_seed']}, "
            f"step {state['step']}; expected iteration {iteration}, seed {run_seed}, at most step {steps}: "
            "resume with the run's own configuration"
        )
