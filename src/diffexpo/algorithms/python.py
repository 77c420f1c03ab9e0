"""A loss of one's own: a user's function of the errors of pairs."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffexpo.algorithms.diffusion_dpo import pair_margin
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.pairs import PairErrors, PairMethod, error_metrics
from diffexpo.config.methods.python import PythonConfig
from diffexpo.config.own_code import digest_of, load_function, split_function
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.errors import ConfigError, DiffexpoError, ResumeError, TrainingError
from diffexpo.types import Conditioning, PairBatch

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def own_pair_loss(
    function: PairLoss,
    winner: Tensor,
    loser: Tensor,
    winner_ref: Tensor,
    loser_ref: Tensor,
    *,
    name: str = "loss",
) -> Tensor:
    """A function's loss of each pair, checked.

    Args:
        function: loss(winner, loser, winner_ref, loser_ref) -> (B,).
        winner, loser: (B,) mean squared prediction errors of the policy at one shared noise and time.
        winner_ref, loser_ref: (B,) those of the reference, without gradient.
        name: Of the function, for messages.
    Returns:
        (B,) in float32 or better. With lambda w, l, wr, lr: w it is the winner's error.
    Raises:
        TrainingError: the function raised, gave another shape than (B,), or something without a gradient.
    """
    try:
        found = function(at_least_float32(winner), at_least_float32(loser), winner_ref, loser_ref)
    except DiffexpoError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"line {frame.lineno} of {Path(frame.filename).name}"
        raise TrainingError(
            f"algorithm.path: {name} raised {type(error).__name__}: {error} ({where}); correct the function"
        ) from error
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(winner.shape):
        raise TrainingError(
            f"algorithm.path: {name} returned {shape} for {len(winner)} pairs; expected a tensor with the "
            "loss of each pair, before any mean"
        )
    if torch.is_grad_enabled() and winner.requires_grad and not found.requires_grad:
        raise TrainingError(
            f"algorithm.path: the loss of {name} does not depend on winner and loser (no gradient reaches "
            "them); compute it with torch from the errors that it is given, without detach or item"
        )
    return at_least_float32(found)


class Python(PairMethod):
    """A user's loss on a `PairBatch`."""

    settings: PythonConfig

    def __init__(self, settings: PythonConfig, empty: Conditioning | None = None) -> None:
        """Refused, with a ResumeError, is a file that changed since the settings were made, and what
        `own_code` refuses; a ConfigError says what the file raised."""
        super().__init__(settings, empty)
        self.name = settings.title
        if settings.path:  # without one the settings stand for the method as such, which no run is given
            self.function = self._load(settings)

    def _load(self, settings: PythonConfig) -> Any:
        file, self.name = split_function(settings.path, "algorithm.path")
        if settings.sha256 is not None and digest_of(file) != settings.sha256:
            raise ResumeError(
                f"algorithm.path = {settings.path}: the file has changed since the run began (SHA-256); "
                "restore it to go on, or start a new run without algorithm.sha256"
            )
        try:
            return load_function(file, self.name, "algorithm.path")
        except DiffexpoError:
            raise
        except Exception as error:
            raise ConfigError(f"algorithm.path: {file} raised {type(error).__name__}: {error}") from error

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        """The function's loss of each pair and the metrics of the errors."""
        loss = own_pair_loss(self.function, *errors.four, name=self.name)
        return loss, error_metrics(errors, pair_margin(*errors.four, beta=2.0), 2.0)
