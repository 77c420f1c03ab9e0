"""The train stage: p_t from p_{t-1}, on what the method's card says that it learns from."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from diffexpo.errors import ResumeError
from diffexpo.online.cost import check_cost, training_cost
from diffexpo.online.loaders import Batches, batches_of
from diffexpo.online.loop import (
    Loop,
    is_complete,
    keep_iterate,
    kept_path,
    load_iterate,
    load_iterates,
    read_kept,
    ticking,
    write_kept,
)
from diffexpo.online.signal import measure_signal
from diffexpo.online.trajectories import check_replay, forget
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.training.optimizer import OptimizerState
from diffexpo.training.progress import TrainReport

REFERENCE = "reference"


def train(loop: Loop, iteration: int) -> None:
    """Train p_t from p_{t-1}; where there is nothing to learn from, p_t is p_{t-1}.

    A method that draws first learns from the transitions of this iteration alone, and goes on with the
    optimiser's state of the one before; the others learn from D_off and every collection before this one.
    """
    card = loop.config.algorithm
    if is_complete(loop, loop.lane + "train", iteration):
        if card.draws_first:
            forget(loop, iteration)
        return
    if card.draws_first:
        load_iterate(loop, iteration - 1, "current")
    else:
        load_iterates(loop, iteration - 1)
        if is_idle(loop, iteration):
            _say_that_nothing_is_trained(loop)
            keep_iterate(loop, iteration, {"pairs/available": 0, "cost/network_evaluations": 0})
            return
    began = time.monotonic()
    set_reference(loop, iteration)
    batches = batches_of(loop, iteration)
    payload = batches.metrics
    state: OptimizerState = read_kept(loop, "optimizer", iteration - 1) if card.draws_first else {}
    if batches.loader.size == 0:
        loop.console.warning(
            f"iteration {iteration}: no transition has anything to teach (rewards equal within every prompt, "
            "or failed); the policy stays as it is"
        )
    else:
        payload |= measure_signal(loop, iteration, batches.loader, "start")
        report = _train(loop, iteration, batches, state)
        payload = report.metrics() | payload | measure_signal(loop, iteration, batches.loader, "end")
        spent = training_cost(loop.config, iteration) + check_cost(loop.config, iteration)
        payload["cost/network_evaluations"] = spent
        state = report.optimizer_state
    unit = "transitions" if card.draws_first else "pairs"
    payload |= {f"{unit}/available": batches.loader.size, "time/train_s": time.monotonic() - began}
    if card.draws_first:
        # Before the manifest: an iteration that is complete has its state.
        write_kept(loop, "optimizer", iteration, state)
    if REFERENCE in card.moving_versions:
        keep_reference(loop, iteration, loop.policy.weights.state(REFERENCE))
    keep_iterate(loop, iteration, payload)
    if card.draws_first:
        forget(loop, iteration)


def set_reference(loop: Loop, iteration: int) -> None:
    """Put in "reference" what an iteration's errors are measured against; "current" keeps p_{t-1}."""
    weights, memory = loop.policy.weights, loop.config.algorithm.reference_memory
    if memory:
        weights.load("reference", reference_after(loop, iteration - 1))
    else:
        # Methods without a reference have the base at hand for their metrics.
        weights.copy("base" if memory is None else "current", "reference")


def reference_after(loop: Loop, iteration: int) -> dict[str, Tensor]:
    """The reference that follows an iteration, r_t = d r_{t-1} + (1 - d) p_t from r_0 = p_0; where it follows
    every step, what the iteration's training left.

    The newest two are kept in files. One that is not there is made anew from the iterates, which leaves p_t
    in "current".
    """
    if iteration == 0:
        return dict(loop.initial)
    path, card = kept_path(loop, REFERENCE, iteration), loop.config.algorithm
    if path.exists():
        return read_tensors(path)
    before = reference_after(loop, iteration - 1)
    if is_idle(loop, iteration):
        return before
    if REFERENCE in card.moving_versions:
        raise ResumeError(
            f"{path} is missing although iteration {iteration} is complete; restore it or start a new run"
        )
    memory = card.reference_share(loop.store.manifest(loop.lane + "train", iteration))
    load_iterate(loop, iteration, "current")
    iterate = loop.policy.weights.state("current")
    mean = {name: torch.lerp(iterate[name], value, memory) for name, value in before.items()}
    keep_reference(loop, iteration, mean)
    return mean


def keep_reference(loop: Loop, iteration: int, reference: Mapping[str, Tensor]) -> None:
    """Write r_t; r_{t-1} stays, because other processes may be reading it."""
    if loop.world.rank == 0:
        write_tensors(kept_path(loop, REFERENCE, iteration), reference)
        kept_path(loop, REFERENCE, iteration - 2).unlink(missing_ok=True)


def is_idle(loop: Loop, iteration: int) -> bool:
    """Whether an iteration has nothing to learn from yet."""
    return iteration < loop.config.algorithm.first_trained(loop.config)


def _train(loop: Loop, iteration: int, batches: Batches, state: OptimizerState) -> TrainReport:
    steps, card = loop.config.training.steps, loop.config.algorithm
    if card.draws_first:
        check_replay(loop, iteration)
    loop.console.line(f"iteration {iteration}: training on {batches.loader.describe()}")
    if loop.world.size > 1:
        facts = {f"what iteration {iteration} learns from": batches.loader.fingerprint()}
        loop.world.refuse_difference(facts, "the store changed while they read it: resume the run")
    total = steps * loop.engine.micro_steps
    with ticking(loop, f"train {iteration}", total, "micro-batches") as tick:
        return loop.engine.train_iteration(
            iteration,
            batches.loader,
            steps=steps,
            checkpoint_dir=loop.run_dir / "checkpoints" / f"iteration-{iteration:04d}",
            run_seed=loop.config.seed,
            tick=tick,
            optimizer_state=state,
            is_checked=iteration == 1 or not card.draws_first,
            starts_apart=card.starts_apart(loop.config, iteration),
        )


def _say_that_nothing_is_trained(loop: Loop) -> None:
    config = loop.config
    reason = "no offline pairs" if config.offline.source is None else "offline pairs alone teach nothing"
    if config.algorithm.improvement is not None:
        reason = "offline pairs train the improvement model only"
    is_base = config.tuning.start is None or config.algorithm.drawn_by == "base"
    who = "the base model" if is_base else "the model it starts from"
    loop.console.line(f"iteration 1: {reason}, so {who} explores")
