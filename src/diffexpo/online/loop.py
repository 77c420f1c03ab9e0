"""The loop of every method: its stages in the order of its card, each skipped where it is complete.

    train -> evaluate -> collect -> pair         of a method that learns from earlier collections
    collect -> [pair] -> train -> evaluate       of one that learns from how its own images were drawn

The first is EXPO's algorithm 1. With `explore.keep: best` a stage "validate" comes before each "evaluate".

What an iteration collects after its evaluation serves the next one, so the last iteration ends with its
evaluation. Every stage looks at its manifest in the store, so the loop can die anywhere and be started again.
"""

from __future__ import annotations

import shutil
import time
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
from diffexpo.errors import PolicyError, ResumeError
from diffexpo.online.improved_pairs import Improving
from diffexpo.online.keeping import STAGE as VALIDATE
from diffexpo.online.keeping import last_iteration
from diffexpo.online.people import AskPeople
from diffexpo.online.units import Score, Tick
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter, peak_memory
from diffexpo.types import Policy, Prompt, StepJudge, WeightSets


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
    validate: Callable[[Loop, int], None] | None = None
    people: AskPeople | None = None


Stage = Callable[[Loop, int], object]


def run(loop: Loop, stages: Mapping[str, Stage], until: tuple[str, int] | None = None) -> None:
    """Run every stage that is not complete, in order, up to the iteration with which the run ends.

    Args:
        stages: What runs each stage: `stages.STAGES`, and `evaluate` and `validate`, which stand above this
            room.
        until: Stop after this (stage, iteration), e.g. ("collect", 1).
    Raises:
        Interrupted: a signal arrived; everything up to here is saved.
    """
    for stage, iteration in schedule(loop.config):
        stages[stage](loop, iteration)
        is_end = stage == "evaluate" and iteration == last_iteration(loop.config, loop.store.root)
        if is_end or until == (stage, iteration):
            return


def schedule(config: RunConfig) -> list[tuple[str, int]]:
    """The stages of a run in order, as planned: (stage, iteration); those that come once, before all others,
    are iteration 0."""
    card, last = config.algorithm, config.explore.iterations
    end = card.stages.index("evaluate")
    ending = [*card.stages[:end], *([VALIDATE] if config.explore.keep == "best" else []), "evaluate"]
    stages = [*ending, *card.stages[end + 1 :]]
    return [(stage, 0) for stage in card.first_stages] + [
        (stage, iteration)
        for iteration in range(1, last + 1)
        for stage in (stages if iteration < last else ending)
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
        write_tensors(kept_path(loop, "weights", iteration), weights.state("current"))
        loop.metrics.write_once(iteration, "train_summary", {**payload, **peak_memory()})
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
    """Put the trained weights of p_t in a version, as `load_trained` does; p_0 is what the policy started
    with."""
    weights = loop.policy.weights
    if iteration == 0:
        weights.load(version, loop.initial)
        return
    path, fact = kept_path(loop, "weights", iteration), f"iteration {iteration} is complete"
    load_trained(loop, weights, version, path, (loop.lane + "train", iteration), fact)


def load_trained(
    loop: Loop, weights: WeightSets, version: str, path: Path, stage: tuple[str, int], fact: str
) -> None:
    """Put a file's weights in a version; `fact` says why the file must be there.

    Raises:
        ResumeError: the file is gone or does not hold the weights that the stage's manifest names.
    """
    if not path.exists():
        raise ResumeError(f"{path} is missing although {fact}; restore it or start a new run")
    try:
        weights.load(version, read_tensors(path))
    except PolicyError as error:
        raise ResumeError(f"{path} holds no weights of this run: {error}; restore it") from error
    if weights.fingerprint(version) != loop.store.manifest(*stage)["weights"]:
        raise ResumeError(
            f"{path} does not hold the weights that were trained; restore it or start a new run"
        )


def kept_path(loop: Loop, name: str, iteration: int) -> Path:
    """Where an iteration keeps tensors of a name: "weights" is p_t."""
    return loop.run_dir / "checkpoints" / f"{name}-{iteration:04d}.safetensors"


def read_kept(loop: Loop, name: str, iteration: int) -> dict[str, dict[str, Tensor]]:
    """What `write_kept` wrote, group -> name -> tensor; empty where there is none."""
    groups: dict[str, dict[str, Tensor]] = {}
    path = kept_path(loop, name, iteration)
    for key, tensor in (read_tensors(path) if path.exists() else {}).items():
        group, _, inner = key.partition("/")
        groups.setdefault(group, {})[inner] = tensor
    return groups


def write_kept(loop: Loop, name: str, iteration: int, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Keep groups of tensors until the next iteration is trained; the first process writes them."""
    if loop.world.rank == 0:
        named = {f"{group}/{inner}": tensors[inner] for group, tensors in groups.items() for inner in tensors}
        write_tensors(kept_path(loop, name, iteration), named)


def draw_stage(
    loop: Loop,
    stage: str,
    iteration: int,
    ticks: int,
    draw: Callable[[Tick], None],
    measure: Callable[[], dict[str, float]],
) -> None:
    """Let every process draw its units, then let the first measure what was drawn; the manifest, written
    last, makes the stage complete."""
    if loop.world.rank == 0:
        loop.store.discard_incomplete(stage, iteration)
    loop.world.barrier()
    began = time.monotonic()
    with ticking(loop, f"{stage} {iteration}", ticks, "batches") as tick:
        draw(tick)
    loop.world.barrier()
    if loop.world.rank == 0:
        payload = measure()
        payload[f"time/{stage}_s"] = time.monotonic() - began
        loop.metrics.write_once(iteration, stage, payload | peak_memory())
        loop.store.write_manifest(stage, iteration, payload)
    loop.world.barrier()


@contextmanager
def ticking(loop: Loop, name: str, total: int, unit: str) -> Iterator[Tick]:
    with loop.console.phase(name, total, unit) as bar:

        def tick() -> None:
            bar.advance(1)
            loop.check_signals()

        yield tick
