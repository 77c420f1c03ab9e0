"""The train stage: p_t from p_{t-1}, on what the method's card says that it learns from."""

from __future__ import annotations

import time

import torch

from diffexpo.online.cost import training_cost
from diffexpo.online.loaders import Batches, batches_of
from diffexpo.online.loop import (
    Loop,
    is_complete,
    keep_iterate,
    load_iterate,
    load_iterates,
    read_kept,
    ticking,
    write_kept,
)
from diffexpo.online.trajectories import check_replay, forget
from diffexpo.training.optimizer import OptimizerState
from diffexpo.training.progress import TrainReport


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
        if iteration == 1 and not card.learns_from_offline(loop.config):
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
        report = _train(loop, iteration, batches, state)
        payload = report.metrics() | payload
        payload["cost/network_evaluations"] = training_cost(loop.config, iteration)
        state = report.optimizer_state
    unit = "transitions" if card.draws_first else "pairs"
    payload |= {f"{unit}/available": batches.loader.size, "time/train_s": time.monotonic() - began}
    if card.draws_first:
        # Before the manifest: an iteration that is complete has its state.
        write_kept(loop, "optimizer", iteration, state)
    keep_iterate(loop, iteration, payload)
    if card.draws_first:
        forget(loop, iteration)


def set_reference(loop: Loop, iteration: int) -> None:
    """Put in "reference" what an iteration's errors are measured against; "current" keeps p_{t-1}.

    r_t = d r_{t-1} + (1 - d) p_t of a reference that follows, made anew from the iterates that a run keeps,
    so that a resumed run and a single stage have the same one.
    """
    weights, memory = loop.policy.weights, loop.config.algorithm.reference_memory
    if not memory:
        # Methods without a reference have the base at hand for their metrics.
        weights.copy("base" if memory is None else "current", "reference")
        return
    mean = dict(loop.initial)
    for earlier in range(1, iteration):
        load_iterate(loop, earlier, "current")
        iterate = weights.state("current")
        mean = {name: torch.lerp(iterate[name], value, memory) for name, value in mean.items()}
    weights.load("reference", mean)


def _train(loop: Loop, iteration: int, batches: Batches, state: OptimizerState) -> TrainReport:
    steps, draws_first = loop.config.training.steps, loop.config.algorithm.draws_first
    if draws_first:
        check_replay(loop, iteration)
    loop.console.line(f"iteration {iteration}: training on {batches.loader.describe()}")
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
            is_checked=iteration == 1 or not draws_first,
        )


def _say_that_nothing_is_trained(loop: Loop) -> None:
    config = loop.config
    reason = "no offline pairs" if config.offline.source is None else "offline pairs alone teach nothing"
    if config.algorithm.improvement is not None:
        reason = "offline pairs train the improvement model only"
    is_base = config.tuning.start is None or config.algorithm.drawn_by == "base"
    who = "the base model" if is_base else "the model it starts from"
    loop.console.line(f"iteration 1: {reason}, so {who} explores")
