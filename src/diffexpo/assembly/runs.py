"""Commands that run stages: the whole run, one stage of it, the plan, the offline baseline.

What is needed at the end only (export, report), or on an accelerator only, is imported there: plotting and
whole pipelines would delay the first line by seconds.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffexpo.assembly.checking import check_inputs
from diffexpo.assembly.contenders import (
    evaluate_guidances,
    open_baseline,
    open_contenders,
    run_baseline,
    run_contender,
    start_from,
)
from diffexpo.assembly.evaluating import EVALUATING, eval_dir, save_examples
from diffexpo.assembly.folders import keep_changes, prepare_folder, require_run, set_status
from diffexpo.assembly.inputs import check_inputs_unchanged
from diffexpo.assembly.objects import PROMPTS, build_loop, describe_policy
from diffexpo.assembly.together import check_same_start, check_shared_folder
from diffexpo.assembly.watching import Watching
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.contenders import read_contenders, start_contender
from diffexpo.config.iterates import run_of_model
from diffexpo.config.rules import negatives_are_on
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, DiffexpoError, Interrupted, MissingError, PolicyError, WaitingError
from diffexpo.estimate.out_of_memory import explain_memory
from diffexpo.evaluation.records import is_saved, load_run, load_suite
from diffexpo.evaluation.summary import summarise
from diffexpo.online import keeping
from diffexpo.online.cost import evaluation_cost, offline_steps_of_equal_cost, run_cost
from diffexpo.online.explore import SCHEDULES
from diffexpo.online.loop import Console, Loop, schedule
from diffexpo.online.loop import run as run_loop
from diffexpo.online.overall import Overall, stage_costs
from diffexpo.online.stages import STAGES
from diffexpo.policies.loading import choose_device
from diffexpo.training.distributed import World, start_world, stop_world
from diffexpo.training.lock import RunLock
from diffexpo.training.signals import StopSignal

if TYPE_CHECKING:
    from diffexpo.assembly.tracking import Feed


def run(
    config: RunConfig,
    run_dir: Path,
    *,
    sources: Mapping[str, str],
    resume: bool,
    console: Console,
    stop_after: str | None = None,
    watching: Watching | None = None,
    accept_changes: bool = False,
) -> Path:
    """A whole run, or what is left of it: base evaluation, the loop, the baseline, export, report.

    Args:
        config: Resolved configuration, with the origin of every value in `sources`.
        run_dir: Its folder; made if new, once everything that the run names is there (`check_inputs`).
        resume: Continue an existing folder; otherwise the folder must be new or hold the same configuration.
        console: Where progress goes.
        stop_after: Stop after this stage, e.g. "collect-1" (`plan` lists them).
        watching: Functions to call while it works.
        accept_changes: Go on with other settings, code or inputs than the run began with, and record that.
    Returns:
        Where the report is, or will be when the run is finished.
    Raises:
        Interrupted: a signal arrived; everything is saved.
        ResumeError: settings, code or inputs are not those that the run began with.
    """
    until = parse_stage(config, stop_after)
    with ExitStack() as stack:
        world = start_world(device=config.model.device)
        stack.push(lambda kind, error, trace: stop_world(world, error))
        check_same_start(config, run_dir, world)
        if not (run_dir / "config.yaml").exists():
            require_run(run_dir, resume)
            check_inputs(config)
        if world.rank == 0:
            stack.enter_context(RunLock(run_dir))
        prepare_folder(config, run_dir, sources, resume, world)
        check_shared_folder(run_dir, world)
        if world.rank == 0:
            console.attach_log(run_dir / "log.txt")
            stack.enter_context(logged_to(console))
            for change in keep_changes(config, run_dir, sources):
                console.line(f"goes on with {change}")
        stop = stack.enter_context(StopSignal())
        if world.group is not None:
            world.group.on_loss = stop.stop
        if run_of_model(config.model.path) is not None and world.rank == 0:
            from diffexpo.assembly.actions import write_model

            write_model(config.model.path)
        world.barrier()
        check_inputs_unchanged(config, run_dir, world, accepts=accept_changes, tell=console.warning)
        set_status(run_dir, "running", world)
        try:
            with explain_memory(config, run_dir):
                _run(config, run_dir, console, stop, world, until, watching or Watching())
            if world.rank == 0 and until is None:
                from diffexpo.evaluation.report import write_report

                write_report(run_dir, "finished")
        except BaseException as error:
            is_stop = isinstance(error, (Interrupted, KeyboardInterrupt))
            state = "waiting" if isinstance(error, WaitingError) else "failed"
            with suppress(DiffexpoError):  # a disk that is full is told by the first error
                set_status(run_dir, "interrupted" if is_stop else state, world)
            raise
        # Last: who finds this finds export and report.
        set_status(run_dir, "finished" if until is None else "stopped", world)
        if world.rank == 0 and until is None:
            from diffexpo.evaluation.headline import closing_lines

            shutil.rmtree(run_dir / PROMPTS, ignore_errors=True)
            for line in closing_lines(run_dir, summarise(load_run(run_dir))):
                console.line(line)
    return run_dir / "report.html"


class ConsoleHandler(logging.Handler):
    """Warnings of the rooms (failed scores, cut prompts) as lines of the console, and so of log.txt."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.warning(record.getMessage())


@contextmanager
def logged_to(console: Console) -> Iterator[None]:
    """Inside the block the package's log records go to the console."""
    logger, handler = logging.getLogger("diffexpo"), ConsoleHandler(console)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _run(
    config: RunConfig,
    run_dir: Path,
    console: Console,
    stop: StopSignal,
    world: World,
    until: tuple[str, int] | None,
    watching: Watching,
) -> None:
    if choose_device(config.model.device).type != "cpu":
        from diffexpo.estimate.room import check_room

        check_room(config, console)
    contenders = read_contenders(config)
    began = time.monotonic()
    loop = build_loop(config, run_dir, console, stop, world)
    start = "" if config.tuning.start is None else f", starting from {config.tuning.start}"
    seconds = f"{time.monotonic() - began:.1f} s"
    console.line(f"loaded {config.model.path} ({describe_policy(loop.policy)}){start} in {seconds}")
    if pull := config.algorithm.describe_pull(math.prod(loop.policy.latent_shape)):
        console.line(pull)
    baseline = open_baseline(loop) if config.baseline.offline_dpo else None
    lanes = open_contenders(loop, contenders)
    check_inputs_unchanged(config, run_dir, world)  # what has only been fetched now is recorded too
    watching.attach(loop)
    feed = open_feed(config, run_dir, loop) if world.rank == 0 and config.tracking.trackers else None
    names = [lane.run_dir.name for lane in lanes]

    def on_stage(number: int, total: int, name: str) -> None:
        watching.stage(number, total, name)
        if feed is not None:
            feed.update()

    overall = Overall(planned_stages(config, names), console.line, on_stage)
    with overall.stage("evaluate base"):
        loop.evaluate(loop, "base", 0)
    # Rewards of the base's images must be finite and not all the same, or they cannot rank anything.
    scores = load_suite(eval_dir(loop) / "base").scores
    loop.ranking.check({name: values[None, :] for name, values in scores.items()})
    if config.evaluation.base_guidances:
        with overall.stage("evaluate guidances"):
            evaluate_guidances(loop)
    if (name := start_contender(config)) is not None:
        loop = start_from(loop, next(lane for lane in lanes if lane.run_dir.name == name))
    run_loop(loop, overall.watch(STAGES | EVALUATING), until)
    if feed is not None:
        feed.update()
    if until is not None:
        return
    if config.explore.keep == "best":
        say_what_is_kept(loop)
    if baseline is not None:
        with overall.stage("baseline"):
            run_baseline(loop, replace(baseline, initial=loop.initial))
    for lane in lanes:
        with overall.stage(f"contender {lane.run_dir.name}"):
            run_contender(lane)
    if world.rank == 0:
        from diffexpo.assembly.actions import export

        save_examples(loop)
        for path in export(run_dir, loop=loop):
            checked = "" if path.suffix == ".md" else " (reloaded in plain diffusers and compared)"
            console.line(f"saved {path}{checked}")
    world.barrier()
    if feed is not None:
        feed.close()


def open_feed(config: RunConfig, run_dir: Path, loop: Loop) -> Feed:
    """The trackers of the settings, told of each line that the run writes."""
    from diffexpo.assembly.tracking import Feed

    feed = Feed(config, run_dir, config.tracking.trackers, config.tracking.project)
    told = loop.metrics.on_line

    def on_line(line: Mapping[str, object]) -> None:
        if told is not None:
            told(line)
        feed.line(line)

    loop.metrics.on_line = on_line
    return feed


def planned_stages(config: RunConfig, lanes: Sequence[str]) -> list[tuple[str, int]]:
    """Everything that a run does in order, with its network evaluations, those of training lanes left out."""
    one = evaluation_cost(config)
    planned = [("evaluate base", one)]
    if config.evaluation.base_guidances:
        planned.append(("evaluate guidances", len(config.evaluation.base_guidances) * one))
    planned += stage_costs(config)
    if config.baseline.offline_dpo:
        planned.append(("baseline", run_cost(config).total + one))
    return [*planned, *((f"contender {name}", one) for name in lanes)]


def say_what_is_kept(loop: Loop) -> None:
    """Name the iterate that validation chose, and evaluate it if it is not yet."""
    config, store = loop.config, loop.store.root
    explore, means = config.explore, keeping.validated(store)
    last, kept = keeping.last_iteration(config, store), keeping.kept_iterate(config, store)
    if last < explore.iterations:
        loop.console.line(f"stopped after iteration {last}: no better validation for {explore.patience}")
    loop.console.line(f"kept iteration {kept}, validated at {means[kept]:.4g} (the last: {means[last]:.4g})")
    loop.evaluate(loop, f"iteration-{kept}", kept)


def parse_stage(config: RunConfig, text: str | None) -> tuple[str, int] | None:
    """ "collect-1" as ("collect", 1); ConfigError if the run has no such stage."""
    stages = {f"{name}-{iteration}": (name, iteration) for name, iteration in schedule(config)}
    if text is not None and text not in stages:
        raise ConfigError(f"stage {text!r} - expected one of {', '.join(stages)}")
    return None if text is None else stages[text]


def stage(run_dir: Path, name: str, console: Console) -> dict[str, Any]:
    """Run a folder's next incomplete stage of one kind; what must come before it is run first.

    Returns:
        `stage`, `iteration` and `numbers`, what the stage's manifest holds (an evaluation has none); without
        numbers, and iteration None, where every iteration was complete.
    """
    config = read_resolved(run_dir / "config.yaml").config
    store = Store(run_dir / "store")
    last = keeping.last_iteration(config, store.root)
    for kind, iteration in schedule(config):
        if iteration > last:
            break
        folder = run_dir / "eval" / f"iteration-{iteration}"
        is_complete = is_saved(folder) if kind == "evaluate" else store.is_complete(kind, iteration)
        if kind == name and not is_complete:
            run(config, run_dir, sources={}, resume=True, console=console, stop_after=f"{kind}-{iteration}")
            numbers = store.manifest(kind, iteration) if store.is_complete(kind, iteration) else {}
            return {"stage": name, "iteration": iteration, "numbers": numbers}
    console.line(f"{name}: every iteration is complete")
    return {"stage": name, "iteration": None, "numbers": {}}


def plan(config: RunConfig) -> list[tuple[str, str]]:
    """What a run will do and cost, without loading a model."""
    cost, explore, training = run_cost(config), config.explore, config.training
    evaluation, card = config.evaluation, config.algorithm
    rows = [("evaluate base", f"{evaluation.num_prompts} held-out prompts, {evaluation.sampler.name}")]
    if evaluation.base_guidances:
        rows += [("", f"at guidance {', '.join(f'{scale:g}' for scale in evaluation.base_guidances)} too")]
    by_people = next(filter(None, (r.plan(explore.prompts_per_iteration) for r in config.rewards)), "")
    unit, images = card.data.unit, card.images_of_prompt(config)
    for name, iteration in schedule(config):
        # Iteration 0 comes before all that is collected.
        tau_of = SCHEDULES[explore.negatives.schedule]
        rate = tau_of(max(iteration, 1), explore.iterations, explore.negatives.initial)
        tau = f", tau {rate:.2f}" if negatives_are_on(config) else ""
        is_idle = iteration < card.first_trained(config)
        steps = f"{training.steps} steps x {training.batch_size} {unit}"
        judged = f"{evaluation.num_prompts} prompts against the base"
        is_base = is_idle and config.tuning.start is None
        what = {
            "train": "nothing: there is nothing to learn from yet" if is_idle else steps,
            "evaluate": "as the base: nothing was trained" if is_base else judged,
            keeping.STAGE: f"{explore.validation.num_prompts} validation prompts",
            "collect": f"{explore.prompts_per_iteration} prompts x {images} images{tau}",
            "pair": "best and worst of each prompt",
            **({"pair": by_people} if by_people else {}),
            **card.plan(config),
        }[name]
        rows.append((f"{name}-{iteration}", what))
    if config.baseline.offline_dpo:
        rows.append(("baseline", f"offline Diffusion-DPO, {offline_steps_of_equal_cost(config)} steps"))
    for contender in read_contenders(config):
        what = "a finished run"
        if contender.finished is None:
            what = f"{run_cost(contender.config).total:,} network evaluations"
        rows.append((f"contender {contender.name}", f"{contender.config.algorithm.title}, {what}"))
    rows.append(("cost", f"{cost.total:,} network evaluations: {cost.split}"))
    trained = f"{cost.pairs_trained:,} {unit} trained, {cost.optimizer_steps:,} steps"
    rows.append(("data", f"{cost.images:,} images drawn, {trained}"))
    tellers = [("sizes", _size_plan)] * bool(config.model.buckets)
    for name, tell in [*tellers, ("disk", _disk_plan), ("time", _time_plan)]:
        try:
            rows.append((name, tell(config)))
        except (MissingError, PolicyError) as error:
            rows.append((name, f"not known: {error}"))
    return rows


def _size_plan(config: RunConfig) -> str:
    """The sizes that images may have, and which of them they are drawn at."""
    from diffexpo.estimate.networks import sizes_of

    drawn = {
        "first": "drawn at the first",
        "uniform": "drawn at all alike",
        "offline": "drawn as often as offline winners have them",
    }
    shown = ", ".join(f"{height}x{width}" for height, width in sizes_of(config).blueprint.image_sizes)
    return f"{shown} (height x width); {drawn[config.explore.aspect]}; evaluated at the first"


def _time_plan(config: RunConfig) -> str:
    """How long it takes here, roughly."""
    from diffexpo.estimate.minutes import minutes_here

    minutes = minutes_here(config)
    told = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    return (
        f"about {told if minutes >= 1.5 else 'a minute'} here, within a factor of 2 or 3; scorers not counted"
    )


def _disk_plan(config: RunConfig) -> str:
    """Bytes that the run leaves, from the model's configuration files."""
    from diffexpo.estimate.resources import disk_items

    items = sorted(disk_items(config), key=lambda item: -item.bytes)
    largest = ", ".join(f"{item.what} {item.bytes / 2**30:.3g}" for item in items[:3])
    return f"{sum(item.bytes for item in items) / 2**30:.3g} GiB; most of it, in GiB: {largest}"
