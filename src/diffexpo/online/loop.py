"""The loop of every method: its stages in the order of its card, each skipped where it is complete.

    train -> evaluate -> collect -> pair         of a method that learns from earlier collections
    collect -> [pair] -> train -> evaluate       of one that learns from how its own images were drawn

The first is EXPO's algorithm 1.

What an iteration collects after its evaluation serves the next one, so the last iteration ends with its
evaluation. Every stage looks at its manifest in the store, so the loop can die anywhere and be started again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.store import Store
from diffexpo.errors import ResumeError
from diffexpo.online.improved_pairs import Improving
from diffexpo.online.units import Score
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.types import Policy, Prompt, StepJudge


class Bar(Protocol):
    """A progress bar of one phase."""

    def advance(self, count: int = 1) -> None: ...


class Console(Protocol):
    """Where the loop reports to a person."""

    def phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Bar]: ...
    def attach_log(self, path: Path) -> None: ...
    def line(self, text: str) -> None: ...
    def warning(self, text: str) -> None: ...


@dataclass(frozen=True)
class Ranking:
    """How scores become an order; the rewards behind it are the builder's business.

    `mix` maps reward -> (G, n) to one score (G, n); `dominance` says which candidate beats which under
    every reward (G, n, n), for Pareto; `uncertainty` gives Gamma (G, n); `check` raises RewardError on scores
    that cannot rank anything; `conflicts` gives metrics of how far the rewards contradict each other.
    """

    judge: str
    mix: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    check: Callable[[Mapping[str, np.ndarray]], None]
    dominance: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None
    uncertainty: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None
    conflicts: Callable[[Mapping[str, np.ndarray]], Mapping[str, float]] = lambda scores: {}


@dataclass
class Loop:
    """Everything one run needs. Built by `diffexpo.assembly`, used by the functions below."""

    config: RunConfig
    run_dir: Path
    policy: Policy
    engine: Engine
    store: Store
    prompts: Sequence[Prompt]
    negatives: Sequence[str]
    embeddings: PromptEmbeddings
    score: Score
    ranking: Ranking
    world: World
    metrics: MetricsWriter
    console: Console
    check_signals: Callable[[], None]
    evaluate: Callable[[Loop, str, int], None]
    initial: Mapping[str, Tensor]
    lane: str = ""
    step_judge: StepJudge | None = None
    improving: Improving | None = None


Stage = Callable[[Loop, int], object]


def run(loop: Loop, stages: Mapping[str, Stage], until: tuple[str, int] | None = None) -> None:
    """Run every stage that is not complete, in order.

    Args:
        loop: The run.
        stages: What runs each stage, by its name: `stages.STAGES`, and `evaluate`, which stands above this
            room.
        until: Stop after this (stage, iteration), e.g. ("collect", 1).
    Raises:
        Interrupted: a signal arrived; everything up to here is saved.
    """
    for stage, iteration in schedule(loop.config):
        stages[stage](loop, iteration)
        if until == (stage, iteration):
            return


def schedule(config: RunConfig) -> list[tuple[str, int]]:
    """The stages of a run in order: (stage, iteration); those that come once, before all others, are
    iteration 0."""
    card, last = config.algorithm, config.explore.iterations
    ending = card.stages[: card.stages.index("evaluate") + 1]
    return [(stage, 0) for stage in card.first_stages] + [
        (stage, iteration)
        for iteration in range(1, last + 1)
        for stage in (card.stages if iteration < last else ending)
    ]


def is_complete(loop: Loop, stage: str, iteration: int) -> bool:
    """Whether a stage was complete when rank 0 came to it; every process gets that answer.

    A process that looked for itself, and came late, could find complete what rank 0 has just finished. It
    would leave out the stage's barrier, and from there on be one stage ahead of all others.
    """
    return loop.world.broadcast_object(loop.store.is_complete(stage, iteration))


def keep_iterate(loop: Loop, iteration: int, payload: Mapping[str, float]) -> None:
    """Write "current" as p_t; the manifest, written last, makes the stage complete."""
    weights = loop.policy.weights
    if loop.world.rank == 0:
        write_tensors(weights_path(loop, iteration), weights.state("current"))
        loop.metrics.write_once(iteration, "train_summary", payload)
        loop.store.write_manifest(
            loop.lane + "train", iteration, {**payload, "weights": weights.fingerprint("current")}
        )
        shutil.rmtree(loop.run_dir / "checkpoints" / f"iteration-{iteration:04d}", ignore_errors=True)
    loop.world.barrier()


def load_iterates(loop: Loop, iteration: int) -> None:
    """Put p_t in "current" and p_{t-1} in "main" (p_0 for both at t = 0)."""
    load_iterate(loop, iteration, "current")
    load_iterate(loop, max(iteration - 1, 0), "main")


def load_iterate(loop: Loop, iteration: int, version: str) -> None:
    """Put the trained weights of p_t in a version; p_0 is what the policy started with.

    Raises:
        ResumeError: the file is gone or does not hold what was trained.
    """
    weights = loop.policy.weights
    if iteration == 0:
        weights.load(version, loop.initial)
        return
    path = weights_path(loop, iteration)
    if not path.exists():
        raise ResumeError(
            f"{path} is missing although iteration {iteration} is complete; restore it or start a new run"
        )
    weights.load(version, read_tensors(path))
    expected = loop.store.manifest(loop.lane + "train", iteration)["weights"]
    if weights.fingerprint(version) != expected:
        raise ResumeError(
            f"{path} does not hold the weights that were trained; restore it or start a new run"
        )


def weights_path(loop: Loop, iteration: int) -> Path:
    """Where p_t is kept."""
    return loop.run_dir / "checkpoints" / f"weights-{iteration:04d}.safetensors"


@contextmanager
def ticking(loop: Loop, name: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    with loop.console.phase(name, total, unit) as bar:

        def tick() -> None:
            bar.advance(1)
            loop.check_signals()

        yield tick
