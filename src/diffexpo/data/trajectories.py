"""The sampled trajectories of the iteration that is being trained, and the batches of transitions made of
them.

One safetensors file for each unit of work is kept next to the store until its iteration is trained: what a
transition's log-prob is computed from must be what the sampler had, bit for bit. Images, rewards and final
latents are in the store, and stay.

    latents (T+1,B,C,h,w), log_probs (T,B)         of every unit
    means (T,B,C,h,w)                              where means are compared
    branch_x_t, branch_winner, branch_loser (R,C,h,w), branch_log_probs, branch_scores (R,2),
    branch_index, branch_row (R,)                  of units whose steps were branched into candidates
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.data.draws import Drawn, Draws, Loader, positions_by
from diffexpo.data.latents import PromptEmbeddings, stacked
from diffexpo.errors import ResumeError
from diffexpo.files import write_bytes
from diffexpo.types import TrajectoryBatch, TrajectoryPairBatch

_OPEN_FILES = 64


class Trajectories:
    """A folder, made at the first write, with one file for each unit of an iteration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def write(self, unit: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a unit's tensors, whole or not at all; before its rows enter the store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self._path(unit), safetensors.torch.save(data))

    def part(self, unit: int, name: str, *place: slice) -> Tensor:
        """A slice of a unit's tensor; a file that is gone or damaged is a ResumeError."""
        return self._unit(unit)[name][place]

    def remove(self) -> None:
        """Delete the folder; missing is fine."""
        self._tensors.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:06d}.safetensors"

    def _unit(self, unit: int) -> dict[str, Tensor]:
        # not `lru_cache`: its cycle with this object would keep large tensors until the next full collection
        if unit in self._tensors:
            return self._tensors[unit]
        if len(self._tensors) >= _OPEN_FILES:
            self._tensors.pop(next(iter(self._tensors)))
        try:
            self._tensors[unit] = safetensors.torch.load_file(self._path(unit))
            return self._tensors[unit]
        except (OSError, SafetensorError) as error:
            raise ResumeError(
                f"{self._path(unit)} cannot be read ({error}), but its images are in the store and not "
                "trained yet; restore it or start the run again"
            ) from error


class Place(NamedTuple):
    """Where a trajectory is stored: its unit, and its row there."""

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


Ref = TypeVar("Ref", TransitionRef, TransitionPairRef)


Tensors = dict[str, Tensor]
"""A transition or two, one row of each tensor, named as in `TrajectoryBatch` and `TrajectoryPairBatch`."""


def transition(trajectories: Trajectories, place: Place, index: int) -> Tensors:
    """One step of a trajectory as it was recorded."""
    x_t, x_next = (row_of(trajectories, "latents", place, at) for at in (index, index + 1))
    return {"x_t": x_t, "x_next": x_next, "old_log_prob": row_of(trajectories, "log_probs", place, index)}


def row_of(trajectories: Trajectories, name: str, place: Place, index: int) -> Tensor:
    """One step's row (1, ...) of a tensor (T,B, ...)."""
    return trajectories.part(place.unit, name, slice(index, index + 1), slice(place.row, place.row + 1))[0]


def read_two_trajectories(trajectories: Trajectories, ref: TransitionPairRef) -> Tensors:
    """The same step of two trajectories."""
    sides = ("winner", ref.winner), ("loser", ref.loser)
    found = ((side, transition(trajectories, place, ref.index)) for side, place in sides)
    return {f"{side}_{name}": tensor for side, tensors in found for name, tensor in tensors.items()}


def read_branch(trajectories: Trajectories, ref: TransitionPairRef) -> Tensors:
    """Two candidates of one x_t."""
    unit, row = ref.winner
    names = ("x_t", "winner", "loser", "log_probs")
    parts = (trajectories.part(unit, f"branch_{name}", slice(row, row + 1)) for name in names)
    x_t, winner, loser, log_probs = parts
    found = {"winner_x_t": x_t, "winner_x_next": winner, "loser_x_t": x_t, "loser_x_next": loser}
    return found | {"winner_old_log_prob": log_probs[:, 0], "loser_old_log_prob": log_probs[:, 1]}


@dataclass(eq=False)
class _Loader(Loader, Generic[Ref]):
    """Passes over all rows, in an order that no process changes, that were drawn by a sampler."""

    trajectories: Trajectories
    refs: Sequence[Ref]
    embeddings: PromptEmbeddings
    sampler: SamplerConfig

    def __post_init__(self) -> None:
        self.size = len(self.refs)
        self._draws: Draws[Ref] = Draws(self.refs, None, self.name(), self.batch_size, units=self._units())

    def _units(self) -> list[list[int]] | None:
        return None

    def _read(self, step: int, read: Callable[[Ref], Tensors]) -> tuple[list[Drawn[Ref]], dict[str, Any]]:
        """The rows of a step's batch, those of one shape consecutive, and the fields of all batches."""
        found = [(row, read(row.ref)) for row in self._draws.batch(step)]
        found.sort(key=lambda entry: tuple(next(iter(entry[1].values())).shape))
        drawn, parts = [row for row, _ in found], [part for _, part in found]
        select, is_guided = self.embeddings.select, self.sampler.guidance != 1.0
        return drawn, {name: _stacked([part[name] for part in parts]) for name in parts[0]} | {
            "index": torch.tensor([row.ref.index for row in drawn], dtype=torch.int64),
            "conditioning": select([row.ref.text for row in drawn]),
            "sampler": self.sampler,
            "negative_conditioning": select([row.ref.negative for row in drawn]) if is_guided else None,
        }


@dataclass(eq=False)
class TransitionLoader(_Loader[TransitionRef]):
    """Batches of transitions; with `needs_means` they carry `old_mean`."""

    needs_means: bool = False

    def row_names(self) -> list[str]:
        return [f"{ref.sample_id}/{ref.index} {ref.advantage!r}" for ref in self.refs]

    def describe(self) -> str:
        """One line for a person: how many transitions of how many images."""
        images = len({ref.sample_id for ref in self.refs})
        return f"{self.size} transitions of {images} images"

    def batch(self, step: int) -> TrajectoryBatch:
        """The batch of a step (from 0); reads only its transitions."""
        drawn, fields = self._read(step, self._transition)
        return TrajectoryBatch(
            advantages=torch.tensor([row.ref.advantage for row in drawn], dtype=torch.float32),
            keys=tuple(f"{row.ref.sample_id}/{row.ref.index}@{row.epoch}" for row in drawn),
            **fields,
        )

    def _transition(self, ref: TransitionRef) -> Tensors:
        found = transition(self.trajectories, ref.place, ref.index)
        if self.needs_means:
            found["old_mean"] = row_of(self.trajectories, "means", ref.place, ref.index)
        return found


@dataclass(eq=False)
class TransitionPairLoader(_Loader[TransitionPairRef]):
    """Batches of pairs of transitions.

    Args:
        read: Gives the tensors of a pair.
        whole_pairs: All steps of a pair of trajectories enter a batch together; in `refs` they are then
            consecutive.
    """

    read: Callable[[Trajectories, TransitionPairRef], Tensors] = read_two_trajectories
    whole_pairs: bool = False

    def row_names(self) -> list[str]:
        return [f"{ref.pair_id}/{ref.index}" for ref in self.refs]

    def describe(self) -> str:
        """One line for a person: how many pairs of transitions, of how many pairs."""
        pairs = len({ref.pair_id for ref in self.refs})
        return f"{self.size} pairs of transitions ({pairs} preferences)"

    def batch(self, step: int) -> TrajectoryPairBatch:
        """The batch of a step (from 0); reads only its transitions."""
        drawn, fields = self._read(step, partial(self.read, self.trajectories))
        return TrajectoryPairBatch(
            winner_reward=torch.tensor([row.ref.winner_reward for row in drawn], dtype=torch.float32),
            loser_reward=torch.tensor([row.ref.loser_reward for row in drawn], dtype=torch.float32),
            keys=tuple(f"{row.ref.pair_id}/{row.ref.index}@{row.epoch}" for row in drawn),
            groups=torch.tensor([row.number for row in drawn], dtype=torch.int64),
            is_grouped=self.whole_pairs,
            **fields,
        )

    def _units(self) -> list[list[int]] | None:
        return positions_by(self.refs, lambda ref: ref.pair_id) if self.whole_pairs else None


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    """One-row tensors as the rows of a batch, in their order."""
    return stacked([torch.cat(list(part)) for _, part in groupby(rows, key=lambda row: row.shape)])
