"""The improvement model's training, and Diffusion-DPO on the pairs that it makes.

improve        text c and the loser's latents   -> the winner
reconstruct    the image x alone                -> x, one of the two by key
unconditional  neither                          -> x, one of the two by key

One prediction error at a random (t, eps) in each row, whatever its task. Source: "Iterative DPO with an
improvement model for fine-tuning diffusion models", eq. 6 to 10; docs/algorithms/improvement_dpo.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffexpo.algorithms.diffusion_dpo import DiffusionDpo
from diffexpo.algorithms.forward import NoiseKey, as_metrics, weighted, with_rows_replaced
from diffexpo.config.methods.card import MethodConfig
from diffexpo.config.schema import ImproverConfig
from diffexpo.diffusion.guidance import with_image
from diffexpo.diffusion.objectives import NoiseDraw, prediction_errors
from diffexpo.rng import keyed_uniform
from diffexpo.types import Conditioning, LossOutput, PairBatch, Policy

IMPROVE, RECONSTRUCT, UNCONDITIONAL = 0, 1, 2
TASKS = ("improve", "reconstruct", "unconditional")


class ImprovementRows(NamedTuple):
    """What a row is trained on: target x0 (B,C,h,w), image condition (B,C,h,w), and whether it keeps its text
    (B,) bool."""

    x0: Tensor
    image: Tensor
    has_text: Tensor


def improvement_tasks(
    keys: Sequence[str], noise_key: NoiseKey, probabilities: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """Each row's task, and whether the tasks without text look at its winner.

    Args:
        keys: Names of the rows.
        noise_key: What the draw is for.
        probabilities: Of improve, reconstruct and unconditional; >= 0 and adding up to 1.
    Returns:
        (task (B,) int64 in {0, 1, 2}, is_winner (B,) bool with probability 1/2). A row depends on noise_key
        and its key only; probabilities (1, 0, 0) give task 0 throughout.
    Raises:
        ValueError: the probabilities are not three that add up to 1.
    Source: the paper trains on "a mixture" and leaves the shares open; x in {x_w, x_l} of its eq. 7 is read
        as even odds.
    """
    if len(probabilities) != 3 or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-6:
        raise ValueError(
            f"improvement_tasks: probabilities are {probabilities}; expected three of 0 or more that add up "
            "to 1"
        )
    first, second = probabilities[0], probabilities[0] + probabilities[1]
    drawn = torch.tensor([keyed_uniform(*noise_key, key, "task") for key in keys], dtype=torch.float64)
    task = (drawn >= first).to(torch.int64) + (drawn >= second).to(torch.int64)
    if probabilities[2] == 0:
        # The sum of the first two may round below 1, and a draw fall beyond it.
        task = task.clamp(max=RECONSTRUCT)
    is_winner = torch.tensor(
        [keyed_uniform(*noise_key, key, "which") < 0.5 for key in keys], dtype=torch.bool
    )
    return task, is_winner


def improvement_rows(winner: Tensor, loser: Tensor, task: Tensor, is_winner: Tensor) -> ImprovementRows:
    """What each row learns to draw, and from what.

    improve: x0 = winner, image = loser, text;   reconstruct: x0 = image = x;   unconditional: x0 = x, image =
        0

    Args:
        winner, loser: (B,C,h,w) clean scaled latents of one prompt each.
        task: (B,) in {0: improve, 1: reconstruct, 2: unconditional}.
        is_winner: (B,) bool, x is the winner (else the loser); the first task does not look at it.
    Returns:
        (x0, image, has_text). Tasks of 0 give (winner, loser, True), bit for bit.
    Source: improvement model, eq. 6, 7 and 8. Unlike in InstructPix2Pix (arXiv 2211.09800) the task with the
        image alone is to reconstruct it, and text and image are not dropped independently: there is no task
        with text alone.
    """
    shape = (-1, *[1] * (winner.ndim - 1))
    task, is_winner = task.to(winner.device), is_winner.to(winner.device)
    improves = (task == IMPROVE).reshape(shape)
    either = torch.where(is_winner.reshape(shape), winner, loser)
    image = torch.where(improves, loser, either)
    image = torch.where((task == UNCONDITIONAL).reshape(shape), torch.zeros_like(image), image)
    return ImprovementRows(torch.where(improves, winner, either), image, task == IMPROVE)


class Improvement:
    """Training of an improvement model on a `PairBatch`; its policy reads the image condition."""

    settings = MethodConfig(type="improvement")

    def __init__(self, settings: ImproverConfig, empty: Conditioning) -> None:
        """`empty`: one-row conditioning of the empty prompt."""
        self.improver = settings
        self.empty = empty

    def loss(self, policy: Policy, batch: PairBatch, noise_key: NoiseKey) -> LossOutput:
        """Mean error over the rows, each with its own task, and the mean error of each task that occurs."""
        task, is_winner = improvement_tasks(batch.keys, noise_key, self.improver.task_probabilities)
        rows = improvement_rows(batch.winner, batch.loser, task, is_winner)
        draw = NoiseDraw.keyed(batch.keys, noise_key, policy.path, batch.winner.shape[1:])
        texts = with_rows_replaced(batch.conditioning, self.empty, ~rows.has_text)
        conditioning = with_image(texts, rows.image)
        with policy.weights.use("current"):
            error = prediction_errors(policy, rows.x0, draw.eps, draw.t, conditioning)
        per_row = weighted(error, batch.weight)
        of_task = {f"train/error_{name}": error[task == index] for index, name in enumerate(TASKS)}
        return LossOutput(per_row.mean(), as_metrics({"train/loss": per_row, **of_task}))


class ImprovementDpo(DiffusionDpo):
    """Diffusion-DPO on pairs of the model's own image (loser) and what the improvement model made of it
    (winner)."""
