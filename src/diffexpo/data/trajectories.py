"""The sampled trajectories of the iteration that is being trained, and the batches of transitions made of
them.

One safetensors file a unit of work lies beside the store until its iteration is trained: what a transition's
log-prob is computed from must be what the sampler had, bit for bit. Images, rewards and final latents are in
the store, and stay.

    latents (T+1,B,C,h,w), log_probs (T,B)               of every unit; means (T,B,C,h,w) where they are
    compared branch_x_t, branch_winner, branch_loser (R,C,h,w), branch_log_probs, branch_scores (R,2),
    branch_index, branch_row (R,)
                                                         of units whose steps were branched into candidates
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.pairs import Epochs
from diffexpo.errors import ResumeError
from diffexpo.files import write_bytes
from diffexpo.types import Conditioning, MixedRows, TrajectoryBatch, TrajectoryPairBatch

_OPEN_FILES = 64


class Trajectories:
    """A folder with one file a unit of an iteration.

    Args:
        folder: Made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def write(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a unit's tensors, whole or not at all; before its rows enter the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self._path(unit), safetensors.torch.save(data))

    def part(self, unit: int, name: str, *place: slice) -> Tensor:
        """A slice of a unit's tensor, from the memory-mapped file.

        Raises:
            ResumeError: the file is gone or damaged.
        """
        return self._unit(unit)[name][place]

    def remove(self) -> None:
        """Delete the folder; missing is fine."""
        self._tensors.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:06d}.safetensors"

    def _unit(self, unit: int) -> dict[str, Tensor]:
        if unit not in self._tensors:
            if len(self._tensors) >= _OPEN_FILES:
                self._tensors.pop(next(iter(self._tensors)))
            try:
                with safe_open(self._path(unit), framework="pt") as file:
                    self._tensors[unit] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ResumeError(
                    f"{self._path(unit)} cannot be read ({error}), but its images are in the store and not "
                    f"trained yet; "
                    "restore it or start the run anew"
                ) from error
        return self._tensors[unit]


class Place(NamedTuple):
    """Where a trajectory lies: its unit, and its row there."""

    unit: int
    row: int


@dataclass(frozen=True, slots=True)
class TransitionRef:
    """One transition to train: the image it belongs to, its place in the sampler's grid, its advantage, and
    its texts."""

    sample_id: str
    place: Place
    index: int
    advantage: float
    text: str
    negative: str


class TransitionLoader:
    """Batches of transitions by step number, without state: passes over all of them in keyed orders.

    Args:
        trajectories: Where they lie.
        refs: Transitions, in an order that no process changes.
        embeddings: Text side.
        sampler: What drew them.
        batch_size: Transitions a step, over all processes.
        run_seed, iteration: Names of the random numbers.
        needs_means: Batches carry `old_mean`.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        refs: Sequence[TransitionRef],
        embeddings: PromptEmbeddings,
        sampler: SamplerConfig,
        *,
        batch_size: int,
        run_seed: int,
        iteration: int,
        needs_means: bool = False,
    ) -> None:
        self._trajectories = trajectories
        self._refs = tuple(refs)
        self._embeddings = embeddings
        self._sampler = sampler
        self._needs_means = needs_means
        self.batch_size = batch_size
        self.size = len(self._refs)
        self._epochs = Epochs(np.ones(self.size), (run_seed, iteration, "batch"))

    def describe(self) -> str:
        """One line for a person: how many transitions of how many images."""
        images = len({ref.sample_id for ref in self._refs})
        return f"{self.size} transitions of {images} images"

    def batch(self, step: int) -> TrajectoryBatch:
        """The batch of a step (from 0); reads only its transitions."""
        drawn = self._epochs.take(step * self.batch_size, (step + 1) * self.batch_size)
        refs = [self._refs[i] for i, _ in drawn]
        both = [transition(self._trajectories, ref.place, ref.index) for ref in refs]
        order = _by_shape([part.x_t for part in both])
        drawn, refs, both = ([rows[i] for i in order] for rows in (drawn, refs, both))
        means = None
        if self._needs_means:
            means = _stacked([row_of(self._trajectories, "means", ref.place, ref.index) for ref in refs])
        return TrajectoryBatch(
            x_t=_stacked([part.x_t for part in both]),
            x_next=_stacked([part.x_next for part in both]),
            index=torch.tensor([ref.index for ref in refs], dtype=torch.int64),
            old_log_prob=torch.cat([part.log_prob for part in both]),
            advantages=torch.tensor([ref.advantage for ref in refs], dtype=torch.float32),
            conditioning=self._embeddings.select([ref.text for ref in refs]),
            keys=tuple(
                f"{ref.sample_id}/{ref.index}@{epoch}" for ref, (_, epoch) in zip(refs, drawn, strict=True)
            ),
            sampler=self._sampler,
            negative_conditioning=_negative(self._embeddings, self._sampler, [ref.negative for ref in refs]),
            old_mean=means,
        )


class PairTensors(NamedTuple):
    """Both transitions of a pair, each tensor with one row."""

    winner_x_t: Tensor
    winner_x_next: Tensor
    loser_x_t: Tensor
    loser_x_next: Tensor
    winner_log_prob: Tensor
    loser_log_prob: Tensor


@dataclass(frozen=True, slots=True)
class TransitionPairRef:
    """Two transitions at one place of the sampler's grid, of which one is preferred.

    `winner` and `loser` are trajectories; for candidates of one x_t both are the branch's row.
    """

    pair_id: str
    index: int
    winner: Place
    loser: Place
    winner_reward: float
    loser_reward: float
    text: str
    negative: str


class TransitionPairLoader:
    """Batches of pairs of transitions by step number, without state: passes over all of them in keyed orders.

    Args:
        trajectories: Where they lie.
        refs: Pairs of transitions, in an order that no process changes.
        embeddings: Text side.
        sampler: What drew them.
        batch_size: Pairs of transitions a step, over all processes; whole groups are taken while they fit.
        run_seed, iteration: Names of the random numbers.
        read: Gives the tensors of a pair; default: of two trajectories.
        whole_pairs: All steps of a pair of trajectories enter a batch together; `refs` then holds them behind
            each other.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        refs: Sequence[TransitionPairRef],
        embeddings: PromptEmbeddings,
        sampler: SamplerConfig,
        *,
        batch_size: int,
        run_seed: int,
        iteration: int,
        read: Callable[[Trajectories, TransitionPairRef], PairTensors] | None = None,
        whole_pairs: bool = False,
    ) -> None:
        self._trajectories = trajectories
        self._refs = tuple(refs)
        self._embeddings = embeddings
        self._sampler = sampler
        self._read = read or read_two_trajectories
        self._whole_pairs = whole_pairs
        self.batch_size = batch_size
        self.size = len(self._refs)
        self._units = _by_pair(self._refs) if whole_pairs else [[i] for i in range(self.size)]
        self._units_per_batch = max(1, batch_size * len(self._units) // max(1, self.size))
        self._epochs = Epochs(np.ones(len(self._units)), (run_seed, iteration, "batch"))

    def describe(self) -> str:
        """One line for a person: how many pairs of transitions, of how many pairs."""
        pairs = len({ref.pair_id for ref in self._refs})
        return f"{self.size} pairs of transitions ({pairs} preferences)"

    def batch(self, step: int) -> TrajectoryPairBatch:
        """The batch of a step (from 0); reads only its transitions."""
        first = step * self._units_per_batch
        drawn = [
            (i, epoch, first + number)
            for number, (unit, epoch) in enumerate(self._epochs.take(first, first + self._units_per_batch))
            for i in self._units[unit]
        ]
        refs = [self._refs[i] for i, _, _ in drawn]
        rows = [self._read(self._trajectories, ref) for ref in refs]
        order = _by_shape([row.winner_x_t for row in rows])
        drawn, refs, rows = ([entries[i] for i in order] for entries in (drawn, refs, rows))
        tensors = PairTensors(*(_stacked(column) for column in zip(*rows, strict=True)))
        return TrajectoryPairBatch(
            winner_x_t=tensors.winner_x_t,
            winner_x_next=tensors.winner_x_next,
            loser_x_t=tensors.loser_x_t,
            loser_x_next=tensors.loser_x_next,
            index=torch.tensor([ref.index for ref in refs], dtype=torch.int64),
            winner_old_log_prob=tensors.winner_log_prob,
            loser_old_log_prob=tensors.loser_log_prob,
            winner_reward=torch.tensor([ref.winner_reward for ref in refs], dtype=torch.float32),
            loser_reward=torch.tensor([ref.loser_reward for ref in refs], dtype=torch.float32),
            conditioning=self._embeddings.select([ref.text for ref in refs]),
            keys=tuple(
                f"{ref.pair_id}/{ref.index}@{epoch}" for ref, (_, epoch, _) in zip(refs, drawn, strict=True)
            ),
            sampler=self._sampler,
            negative_conditioning=_negative(self._embeddings, self._sampler, [ref.negative for ref in refs]),
            groups=torch.tensor([number for _, _, number in drawn], dtype=torch.int64),
            is_grouped=self._whole_pairs,
        )


class TransitionTensors(NamedTuple):
    """A transition, each tensor with one row."""

    x_t: Tensor
    x_next: Tensor
    log_prob: Tensor


def transition(trajectories: Trajectories, place: Place, index: int) -> TransitionTensors:
    """One step of a trajectory as it was recorded."""
    ends = trajectories.part(place.unit, "latents", slice(index, index + 2), slice(place.row, place.row + 1))
    log_prob = trajectories.part(
        place.unit, "log_probs", slice(index, index + 1), slice(place.row, place.row + 1)
    )
    return TransitionTensors(ends[0], ends[1], log_prob[0])


def row_of(trajectories: Trajectories, name: str, place: Place, index: int) -> Tensor:
    """One step's row (1, ...) of a tensor (T,B, ...)."""
    return trajectories.part(place.unit, name, slice(index, index + 1), slice(place.row, place.row + 1))[0]


def read_two_trajectories(trajectories: Trajectories, ref: TransitionPairRef) -> PairTensors:
    """The same step of two trajectories."""
    winner = transition(trajectories, ref.winner, ref.index)
    loser = transition(trajectories, ref.loser, ref.index)
    return PairTensors(winner.x_t, winner.x_next, loser.x_t, loser.x_next, winner.log_prob, loser.log_prob)


def read_branch(trajectories: Trajectories, ref: TransitionPairRef) -> PairTensors:
    """Two candidates of one x_t."""
    unit, row = ref.winner
    here = slice(row, row + 1)
    x_t = trajectories.part(unit, "branch_x_t", here)
    log_probs = trajectories.part(unit, "branch_log_probs", here)
    return PairTensors(
        x_t,
        trajectories.part(unit, "branch_winner", here),
        x_t,
        trajectories.part(unit, "branch_loser", here),
        log_probs[:, 0],
        log_probs[:, 1],
    )


def _by_shape(rows: Sequence[Tensor]) -> list[int]:
    """Places of one-row tensors, those of one shape behind each other; as they are where all have one
    shape."""
    return sorted(range(len(rows)), key=lambda place: tuple(rows[place].shape))


def _stacked(rows: Sequence[Tensor]) -> Tensor | MixedRows:
    """One-row tensors as the rows of a batch, in their order."""
    if all(row.shape == rows[0].shape for row in rows):
        return torch.cat(list(rows))
    parts = [list(part) for _, part in groupby(rows, key=lambda row: row.shape)]
    return MixedRows(tuple(torch.cat(part) for part in parts))


def _by_pair(refs: tuple[TransitionPairRef, ...]) -> list[list[int]]:
    units: dict[str, list[int]] = {}
    for i, ref in enumerate(refs):
        units.setdefault(ref.pair_id, []).append(i)
    return list(units.values())


def _negative(
    embeddings: PromptEmbeddings, sampler: SamplerConfig, texts: Sequence[str]
) -> Conditioning | None:
    return embeddings.select(texts) if sampler.guidance != 1.0 else None
