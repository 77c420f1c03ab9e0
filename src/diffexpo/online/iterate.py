r"""The outer loop of everything that learns from pairs: train, evaluate, collect, pair, repeat.

    for t = 1 .. T:
        p_t = train(init p_{t-1}, reference, D_off + D_1 + ... + D_{t-1})
        evaluate p_t
        if t < T:
            collect D_t with main = p_{t-1} and exploration = p_t;  pair best and worst

(EXPO algorithm 1; nothing is collected after the last update, because nothing would learn from it.) Every
stage looks at its manifest in the store and skips what is complete, so the loop can die anywhere and be
started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.algorithms import (
    AdvantageConfig,
    DiffusionKtoConfig,
    ExpoConfig,
    ImprovementDpoConfig,
    MethodConfig,
    RwrConfig,
    SftConfig,
    SpinConfig,
)
from diffexpo.config.image_rules import learns_from_offline
from diffexpo.config.schema import RunConfig, SamplerConfig
from diffexpo.data.images import size_name
from diffexpo.data.latents import PromptEmbeddings, image_sizes, latent_shapes
from diffexpo.data.pairs import PairLoader, PairSource
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.scored import Keep, ScoredLoader, ScoredSource, Weigh
from diffexpo.data.store import Store
from diffexpo.errors import ResumeError
from diffexpo.online.advantages import group_advantages
from diffexpo.online.agents import Agent, make_agents
from diffexpo.online.collect import (
    Draw,
    Drawing,
    Score,
    collect,
    group_rows,
    latents_of_unit,
    make_units,
    no_scores,
    texts_needed,
)
from diffexpo.online.cost import contrast_pairs, sampling_cost, training_cost
from diffexpo.online.explore import SCHEDULES, attach_negatives, choose_buckets, draw_prompts
from diffexpo.online.improved_pairs import Improving, make_improved_pairs
from diffexpo.online.pairing import PairingReport, make_pairs
from diffexpo.online.self_play import data_images, make_self_pairs
from diffexpo.training.checkpoint import read_tensors, remove_checkpoints, write_tensors
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.types import Algorithm, PairBatch, Policy, Prompt, ScoredBatch, StepJudge, WeighsImages


class Bar(Protocol):
    """A progress bar of one phase."""

    def advance(self, count: int = 1) -> None: ...


class Console(Protocol):
    """Where the loop reports to a person."""

    def phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Bar]: ...
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
    score_latents: Score = no_scores


STAGES = ("train", "evaluate", "collect", "pair")


def run(loop: Loop, on_iterate: Callable[[Loop, int], None], until: tuple[str, int] | None = None) -> None:
    """Run every stage that is not complete, in order.

    Args:
        loop: The run.
        on_iterate: Called with each new iterate (the evaluation, which stands above this room).
        until: Stop after this (stage, iteration), e.g. ("collect", 1).
    Raises:
        Interrupted: a signal arrived; everything up to here is saved.
    """
    for stage, iteration in schedule(loop.config):
        if stage == "evaluate":
            on_iterate(loop, iteration)
        else:
            {"train": train, "collect": collect_iteration, "pair": pair}[stage](loop, iteration)
        if until == (stage, iteration):
            return


def schedule(config: RunConfig) -> list[tuple[str, int]]:
    """The stages of a run in order: (stage, iteration)."""
    last = config.explore.iterations
    return [
        (stage, iteration)
        for iteration in range(1, last + 1)
        for stage in STAGES
        if iteration < last or stage in ("train", "evaluate")
    ]


def train(loop: Loop, iteration: int) -> None:
    """Train p_t from p_{t-1} on D_off and everything collected so far; without D_off, p_1 is p_0."""
    if is_complete(loop, loop.lane + "train", iteration):
        return
    config = loop.config
    load_iterates(loop, iteration - 1)
    if iteration == 1 and not learns_from_offline(config):
        reason = "no offline pairs" if config.offline.source is None else "offline pairs alone teach nothing"
        if isinstance(config.algorithm, ImprovementDpoConfig):
            reason = "offline pairs train the improvement model only"
        who = "the base model" if config.tuning.start is None else "the model it starts from"
        loop.console.line(f"iteration 1: {reason}, so {who} explores")
        keep_iterate(loop, iteration, {"pairs/available": 0, "cost/network_evaluations": 0})
        return
    weights = loop.policy.weights
    # Methods without a reference have no such setting; the base is at hand for their metrics.
    is_moving = getattr(config.algorithm, "reference", "base") == "previous"
    weights.copy("current" if is_moving else "base", "reference")
    loader = LOADERS[loop.engine.algorithm.batch_type](loop, iteration)
    loop.console.line(f"iteration {iteration}: training on {loader.describe()}")
    began = time.monotonic()
    with ticking(
        loop, f"train {iteration}", config.training.steps * loop.engine.micro_steps, "micro-batches"
    ) as tick:
        report = loop.engine.train_iteration(
            iteration,
            loader,
            steps=config.training.steps,
            checkpoint_dir=loop.run_dir / "checkpoints" / f"iteration-{iteration:04d}",
            run_seed=config.seed,
            tick=tick,
        )
    payload = report.metrics() | {
        "pairs/available": loader.size,
        "cost/network_evaluations": training_cost(config, iteration),
        "time/train_s": time.monotonic() - began,
    }
    keep_iterate(loop, iteration, payload)


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
        remove_checkpoints(loop.run_dir / "checkpoints" / f"iteration-{iteration:04d}")
    loop.world.barrier()


def collect_iteration(loop: Loop, iteration: int) -> None:
    """Both agents draw images for this iteration's prompts; rewards score them; rows and latents go to the
    store."""
    if is_complete(loop, "collect", iteration):
        return
    load_iterates(loop, iteration)
    explore = loop.config.explore

    def measure(groups: list[list[Sample]]) -> dict[str, float]:
        loop.ranking.check(stack_rewards(groups))
        # Pairs are counted when they are made.
        return reward_metrics(loop, groups) if loop.engine.algorithm.batch_type is ScoredBatch else {}

    draw_images(loop, iteration, make_agents(loop.policy.weights, explore), explore.sampler, measure)


def draw_images(
    loop: Loop,
    iteration: int,
    agents: Sequence[Agent],
    sampler: SamplerConfig,
    measure: Callable[[list[list[Sample]]], Mapping[str, float]],
    draw: Draw = latents_of_unit,
) -> None:
    """Agents draw images for this iteration's prompts; the manifest, written last, makes the stage complete.

    Args:
        loop: The run, with the agents' weights in place.
        iteration: Whose prompts and noise.
        agents: Who draws.
        sampler: How.
        measure: What is to be known of the images of each request, as metrics; called once, may raise.
        draw: Gives the latents of a unit.
    """
    config, explore = loop.config, loop.config.explore
    rate = SCHEDULES[explore.negatives.schedule](iteration, explore.iterations, explore.negatives.initial)
    prompts = draw_prompts(loop.prompts, iteration, explore.prompts_per_iteration, config.seed)
    requests = attach_negatives(prompts, loop.negatives, rate, iteration, config.seed)
    requests = choose_buckets(requests, aspect_shares(loop), config.seed)
    append = explore.negatives.mode == "append"
    loop.embeddings.add(texts_needed(requests, append))
    drawing = Drawing(
        loop.policy,
        loop.embeddings,
        loop.score,
        sampler,
        append,
        config.seed,
        iteration,
        config.model.path,
        loop.score_latents,
        merged=explore.merge_lora,
    )
    units = make_units(agents, requests, explore.batch_size)
    share = len(units[loop.world.rank :: loop.world.size])
    if loop.world.rank == 0:
        loop.store.discard_incomplete("collect", iteration)
    loop.world.barrier()
    began = time.monotonic()
    with ticking(loop, f"collect {iteration}", share * (sampler.steps + 1), "batches") as tick:
        collect(
            drawing,
            units,
            loop.store,
            rank=loop.world.rank,
            size=loop.world.size,
            tick=tick,
            draw=draw,
            overlap=explore.overlap_scoring,
        )
    loop.world.barrier()
    if loop.world.rank == 0:
        rows = loop.store.collected(iteration)
        groups = group_rows(rows)
        extra = measure(groups)
        conflicts = dict(loop.ranking.conflicts(stack_rewards(groups)))
        drawn = collection_metrics(rows, first_ranked(config))
        payload = {"explore/tau": rate} | drawn | conflicts | dict(extra)
        payload["cost/network_evaluations"] = sampling_cost(config, len(rows))
        payload["time/collect_s"] = time.monotonic() - began
        loop.metrics.write_once(iteration, "collect", payload)
        loop.store.write_manifest("collect", iteration, payload)
        for name, share in conflicts.items():
            couple, _, what = name.removeprefix("rollout/conflict/").rpartition("/")
            if what == "disagreement":
                loop.console.line(
                    f"iteration {iteration}: rewards {couple} order {share:.0%} of image couples oppositely"
                )
    loop.world.barrier()


def aspect_shares(loop: Loop) -> list[float]:
    """How often each of the policy's sizes is drawn at, as `explore.aspect` says; one number where there is
    no choice."""
    aspect, count = loop.config.explore.aspect, len(latent_shapes(loop.policy))
    if aspect == "first" or count == 1:
        return [1.0]
    if aspect == "uniform":
        return [1.0] * count
    pairs = loop.store.manifest("offline", 0)["report"]["sizes"]
    return [float(pairs.get(size_name(*size), 0)) for size in image_sizes(loop.policy)]


def picture_sizes(loop: Loop) -> dict[str, tuple[int, int]]:
    """Size of each stored sample's picture by its id; empty where all pictures have one size."""
    return loop.store.sizes() if len(latent_shapes(loop.policy)) > 1 else {}


def pair(loop: Loop, iteration: int) -> PairingReport | None:
    """Rank each prompt's candidates; the best and the worst become winner and loser."""
    if is_complete(loop, "pair", iteration):
        return None
    report = None
    if loop.world.rank == 0:
        loop.store.discard_incomplete("pair", iteration)
        groups = group_rows(loop.store.samples(iteration))
        pairs, report = _paired(loop, groups, iteration)
        loop.store.append_pairs(iteration, 0, pairs)
        loop.metrics.write_once(iteration, "pair", report.metrics())
        loop.store.write_manifest("pair", iteration, report.metrics())
        loop.console.line(f"iteration {iteration}: {report.describe()}")
    loop.world.barrier()
    return report


def _paired(
    loop: Loop, groups: Sequence[Sequence[Sample]], iteration: int
) -> tuple[list[Pair], PairingReport]:
    """Best against worst, data against own images, or improved images against what they were improved
    from."""
    seed, ranking = loop.config.seed, loop.ranking
    if isinstance(loop.config.algorithm, SpinConfig):
        return make_self_pairs(groups, data_images(loop.store), iteration=iteration, seed=seed)
    if isinstance(loop.config.algorithm, ImprovementDpoConfig):
        keeps_all = not loop.config.algorithm.filter_by_reward
        return make_improved_pairs(
            groups,
            loop.store.latent,
            iteration=iteration,
            score=None if keeps_all else lambda pairs: _gaps(loop, pairs),
            min_margin=loop.config.pairing.min_margin,
        )
    scores = stack_rewards(groups)
    return make_pairs(
        groups,
        ranking.mix(scores),
        iteration=iteration,
        seed=seed,
        judge=ranking.judge,
        min_margin=loop.config.pairing.min_margin,
        dominance=ranking.dominance(scores) if ranking.dominance else None,
        uncertainty=ranking.uncertainty(scores) if ranking.uncertainty else None,
    )


def _gaps(loop: Loop, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    """Mixed score (G,) of the first image of each couple above the second; with Pareto NaN where one reward
    does not agree."""
    scores = stack_rewards(groups)
    mixed = loop.ranking.mix(scores)
    gaps = mixed[:, 0] - mixed[:, 1]
    if loop.ranking.dominance is not None:
        gaps = np.where(loop.ranking.dominance(scores)[:, 0, 1], gaps, np.minimum(gaps, 0.0))
    return gaps


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


def first_ranked(config: RunConfig) -> str | None:
    """The first reward that ranks, by which agents are compared."""
    return next((reward.name for reward in config.rewards if reward.role == "train"), None)


def collection_metrics(samples: Sequence[Sample], ranked: str | None = None) -> dict[str, float]:
    """Means of what was drawn, by reward, by negative prompt, and by agent under the reward `ranked` (else
    the first)."""
    metrics: dict[str, float] = {"rollout/images": len(samples)}
    metrics["rollout/negative_prompt_fraction"] = float(
        np.mean([bool(sample.negative_prompt) for sample in samples])
    )
    names = list(samples[0].rewards)
    for name in names:
        values = np.array([sample.rewards[name] for sample in samples], dtype=np.float64)
        good = np.isfinite(values)
        metrics[f"rollout/reward/{name}/mean"] = float(values[good].mean()) if good.any() else float("nan")
        metrics[f"rollout/reward/{name}/std"] = float(values[good].std()) if good.any() else float("nan")
        metrics[f"rollout/reward/{name}/failed"] = int((~good).sum())
    shown = ranked if ranked in names else next(iter(names), "")
    for agent in dict.fromkeys(sample.agent for sample in samples if names):
        own = np.array(
            [sample.rewards[shown] for sample in samples if sample.agent == agent], dtype=np.float64
        )
        metrics[f"rollout/agent/{agent}/reward"] = (
            float(np.nanmean(own)) if np.isfinite(own).any() else float("nan")
        )
    return metrics


def _pair_loader(loop: Loop, iteration: int) -> PairLoader:
    config = loop.config
    refs = PairSource(loop.store, config.hybrid).index(iteration)
    algorithm = config.algorithm
    use_contrast = isinstance(algorithm, ExpoConfig) and algorithm.alpha > 0
    loop.embeddings.add(["", *refs.prompts()])
    return PairLoader(
        loop.store,
        refs,
        loop.embeddings,
        batch_size=config.training.batch_size,
        run_seed=config.seed,
        iteration=iteration,
        contrast_per_batch=contrast_pairs(config.training.batch_size, algorithm.contrast_fraction)
        if use_contrast
        else 0,
        sizes=picture_sizes(loop),
    )


def _scored_loader(loop: Loop, iteration: int) -> ScoredLoader:
    config, algorithm, sizes = loop.config, loop.config.algorithm, picture_sizes(loop)
    global_std = isinstance(algorithm, AdvantageConfig) and algorithm.global_std
    source = ScoredSource(
        loop.store,
        config.hybrid,
        loop.ranking.mix,
        lambda rewards, groups: group_advantages(rewards, groups, global_std=global_std),
        keep=_kept_images(algorithm),
        desirable_fraction=algorithm.desirable_fraction
        if isinstance(algorithm, DiffusionKtoConfig)
        else None,
        weigh=_weigher(loop.engine.algorithm),
        weigh_scope=algorithm.scope if isinstance(algorithm, RwrConfig) else "prompt",
        sizes=sizes,
    )
    index = source.index(iteration)
    loop.embeddings.add(["", *index.prompts()])
    return ScoredLoader(
        loop.store,
        index,
        loop.embeddings,
        batch_size=config.training.batch_size,
        run_seed=config.seed,
        iteration=iteration,
        whole_groups=loop.engine.algorithm.needs_whole_groups,
        sizes=sizes,
    )


def _weigher(algorithm: Algorithm) -> Weigh | None:
    if not isinstance(algorithm, WeighsImages):
        return None
    return lambda rewards: algorithm.weigh(torch.from_numpy(rewards)).numpy()


def _kept_images(algorithm: MethodConfig) -> Keep:
    """An image that equals its prompt's mean is neither desirable nor not."""
    if isinstance(algorithm, SftConfig):
        return algorithm.keep
    return "decided" if isinstance(algorithm, DiffusionKtoConfig) else "all"


LOADERS: dict[type, Callable[[Loop, int], PairLoader | ScoredLoader]] = {
    PairBatch: _pair_loader,
    ScoredBatch: _scored_loader,
}
"""What gives an iteration's batches, by the type of batch that the algorithm learns from."""


def mixed_rewards(loop: Loop, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    """One reward an image, (G, n); NaN where scoring failed."""
    return np.asarray(loop.ranking.mix(stack_rewards(groups)), dtype=np.float64)


def reward_metrics(loop: Loop, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """How many images cannot teach: those without a finite reward, and those of prompts whose images are all
    equal."""
    rewards = mixed_rewards(loop, groups)
    is_flat = [len(set(row[np.isfinite(row)].tolist())) < 2 for row in rewards]
    return {
        "rollout/advantage/dropped": int((~np.isfinite(rewards)).sum()),
        "rollout/advantage/zero_fraction": float(np.mean(is_flat)),
    }


def stack_rewards(groups: Sequence[Sequence[Sample]]) -> dict[str, np.ndarray]:
    """Rewards of G groups of n samples each: name -> (G, n)."""
    names = list(groups[0][0].rewards)
    return {
        name: np.array([[sample.rewards[name] for sample in group] for group in groups], dtype=np.float64)
        for name in names
    }


@contextmanager
def ticking(loop: Loop, name: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    with loop.console.phase(name, total, unit) as bar:

        def tick() -> None:
            bar.advance(1)
            loop.check_signals()

        yield tick
