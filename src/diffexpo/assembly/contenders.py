"""What a run is compared with besides its base: the base at other guidance, offline DPO at equal cost,
recipes that are trained beside it, and finished runs.

    <run>/baseline/                 offline DPO: metrics.jsonl, checkpoints/; evaluated in <run>/eval/baseline
    <run>/contenders/<name>/        every other: config.yaml, metrics.jsonl, checkpoints/, store/
    <run>/contenders/eval/<name>/   its evaluation, on the run's prompts and noise

Each is a lane: the run's loop with other settings, in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffexpo.assembly.aliases import negative_prompts
from diffexpo.assembly.evaluating import EVALUATING, on_iterate
from diffexpo.assembly.objects import build_ranking, import_pairs, make_engine, open_store
from diffexpo.assembly.starting import weights_of_run
from diffexpo.config import RunConfig, config_to_yaml, read_resolved
from diffexpo.config.contenders import KEY, Contender
from diffexpo.config.methods import offline_baseline
from diffexpo.data.store import Store
from diffexpo.evaluation.records import CONTENDERS, load_run
from diffexpo.evaluation.spending import spent_until
from diffexpo.evaluation.summary import summarise
from diffexpo.files import write_text
from diffexpo.online import keeping
from diffexpo.online.cost import offline_steps_of_equal_cost
from diffexpo.online.loop import Loop, is_complete, keep_iterate, kept_path, load_iterate
from diffexpo.online.loop import run as run_loop
from diffexpo.online.self_play import data_prompts
from diffexpo.online.stages import STAGES
from diffexpo.policies.family import FamilyPolicy
from diffexpo.training.checkpoint import write_tensors
from diffexpo.training.metrics import MetricsWriter

BASELINE = "baseline"


def evaluate_guidances(loop: Loop) -> None:
    """Evaluate the base at the scales of `evaluation.base_guidances`."""
    evaluation = loop.config.evaluation
    for scale in evaluation.base_guidances:
        sampler = evaluation.sampler.model_copy(update={"guidance": scale})
        settings = evaluation.model_copy(update={"sampler": sampler})
        name = f"base-{scale:g}"
        config = loop.config.model_copy(update={"evaluation": settings})
        lane = _lane(loop, loop.run_dir / CONTENDERS / name, config)
        lane.evaluate(lane, name, 0)


def open_baseline(loop: Loop) -> Loop:
    """The lane of offline DPO, whose pairs are imported if they are not those of the run."""
    config, source = loop.config, loop.config.baseline.offline_source
    folder = loop.run_dir / BASELINE
    changes = {
        "explore": config.explore.model_copy(update={"iterations": 1, "keep": "last"}),
        "algorithm": offline_baseline(config.algorithm, starts_apart=config.tuning.start is not None),
    }
    if source is None:
        return _lane(loop, folder, config.model_copy(update=changes))
    offline = config.offline.model_copy(update={"source": source, "format": "auto", "limit": None})
    lane = _lane(loop, folder, config.model_copy(update=changes | {"offline": offline}))
    return _with_store(lane)


def run_baseline(loop: Loop, lane: Loop) -> None:
    """Diffusion-DPO on D_off alone with as many network evaluations as the run, evaluated like an iterate.

    Args:
        loop: The run, done. lane: Of `open_baseline`.
    """
    last = keeping.last_iteration(loop.config, loop.store.root)
    explore = loop.config.explore.model_copy(update={"iterations": last})
    steps = offline_steps_of_equal_cost(loop.config.model_copy(update={"explore": explore}))
    training = lane.config.training.model_copy(update={"steps": steps})
    lane = replace(lane, config=lane.config.model_copy(update={"training": training}))
    done = f"{steps} steps (as many network evaluations as the run)"
    loop.console.line(f"baseline: offline Diffusion-DPO, {done}")
    _run_lane(lane)


def open_contenders(loop: Loop, contenders: Sequence[Contender]) -> list[Loop]:
    """The lanes of all contenders: what may be missing is looked for, and weights of finished runs are
    copied."""
    return [_open(loop, contender) for contender in contenders]


def run_contender(lane: Loop) -> None:
    """Train a contender, unless it is a finished run, and evaluate its last iterate."""
    name, card = lane.lane.removesuffix("_"), lane.config.algorithm
    lane.console.line(f"contender {name}: {card.title}")
    last = lane.config.explore.iterations
    if is_complete(lane, lane.lane + "train", last):
        on_iterate(lane, last)
    else:
        _run_lane(lane)


def start_from(loop: Loop, lane: Loop) -> Loop:
    """The run as it starts from a contender: that is trained, and its last iterate becomes p_0."""
    run_contender(lane)
    load_iterate(lane, lane.config.explore.iterations, "current")
    start = loop.policy.weights.state("current")
    if loop.world.rank == 0:
        write_tensors(kept_path(loop, "weights", 0), start)
    loop.world.barrier()
    return replace(loop, initial=start)


def _run_lane(lane: Loop) -> None:
    config, metrics = lane.config, lane.metrics
    engine = make_engine(config, lane.policy, lane.embeddings, metrics, lane.world, lane.console)
    run_loop(replace(lane, engine=engine), STAGES | EVALUATING)


def _lane(loop: Loop, folder: Path, config: RunConfig) -> Loop:
    metrics = MetricsWriter(folder / "metrics.jsonl", active=loop.world.rank == 0)
    return replace(loop, config=config, run_dir=folder, metrics=metrics, lane=f"{folder.name}_")


def _with_store(lane: Loop) -> Loop:
    """The lane with a store of its own, which has its offline pairs."""
    store = open_store(lane.run_dir, lane.world)
    if lane.config.offline.source is not None:
        assert isinstance(lane.policy, FamilyPolicy)  # a run's policy was loaded
        import_pairs(lane.config, lane.policy, store, lane.console, lane.check_signals, lane.world)
    return replace(lane, store=store)


def _open(loop: Loop, contender: Contender) -> Loop:
    folder, config = loop.run_dir / CONTENDERS / contender.name, contender.config
    path = folder / "config.yaml"
    if path.exists():
        config = read_resolved(path).config  # a resumed run goes on with the recipe as it was
    loop.world.barrier()
    if loop.world.rank == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, config_to_yaml(config))
    lane = _lane(loop, folder, config)
    if contender.finished is not None:
        lane = replace(lane, store=Store(folder / "store"))
        _adopt(lane, contender.finished, contender.iteration)
        return lane
    lane = _with_store(lane)
    return replace(
        lane,
        ranking=build_ranking(config),
        prompts=data_prompts(lane.store) if config.algorithm.prompts_of_data else loop.prompts,
        negatives=negative_prompts(config.explore.negatives.source)[0],
    )


def _adopt(lane: Loop, finished: Path, iteration: int | None) -> None:
    """Take over the result of a finished run, or one of its iterates, and what its training cost so far."""
    last = lane.config.explore.iterations
    if is_complete(lane, lane.lane + "train", last):
        return
    lane.policy.weights.load("current", weights_of_run(lane.config, finished, KEY, iteration))
    record = load_run(finished)
    if iteration is not None:
        record.metrics = spent_until(record.metrics, iteration, lane.config.algorithm.draws_first)
    cost = summarise(record).method_cost
    keep_iterate(lane, last, {} if cost is None else {"cost/network_evaluations": cost})
