"""The collect stage: agents draw images for an iteration's prompts, rewards score them, the store keeps
them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from diffexpo.config import RunConfig
from diffexpo.config.methods.data import Images
from diffexpo.config.schema import SamplerConfig
from diffexpo.data.images import size_name
from diffexpo.data.latents import image_sizes, latent_shapes
from diffexpo.data.rows import Sample
from diffexpo.online.agents import Agent, make_agents, one_agent
from diffexpo.online.cost import sampling_cost
from diffexpo.online.credit import reward_metrics, stack_rewards
from diffexpo.online.explore import SCHEDULES, attach_negatives, choose_buckets, draw_prompts
from diffexpo.online.loop import Loop, is_complete, load_iterate, load_iterates, ticking
from diffexpo.online.trajectories import branch_metrics, draw_and_keep, iteration_sampler, trajectories_of
from diffexpo.online.units import (
    Draw,
    Drawing,
    group_rows,
    latents_of_unit,
    make_units,
    texts_needed,
)
from diffexpo.online.units import (
    collect as collect_units,
)


def collect(loop: Loop, iteration: int) -> None:
    """Draw and score this iteration's images, with both agents, or with the newest policy alone where the
    method learns from its trajectories, which are kept until they are trained."""
    if is_complete(loop, "collect", iteration):
        return
    explore, card, weights = loop.config.explore, loop.config.algorithm, loop.policy.weights
    sampler, draw = explore.sampler, latents_of_unit
    if card.draws_first:
        load_iterate(loop, iteration - 1, "current")
        agents = one_agent(weights, explore)
        sampler = iteration_sampler(loop, iteration)
        draw = partial(draw_and_keep, loop, trajectories_of(loop, iteration))
    else:
        load_iterates(loop, iteration)
        agents = make_agents(weights, explore)

    def measure(groups: list[list[Sample]]) -> dict[str, float]:
        # Later rewards of a trajectory method may be equal: then nothing is trained, which is said.
        if iteration == 1 or not card.draws_first:
            loop.ranking.check(stack_rewards(groups))
        # Pairs are counted when they are made.
        has_credit = card.draws_first or isinstance(card.data, Images)
        return (reward_metrics(loop, groups) if has_credit else {}) | branch_metrics(loop, iteration, groups)

    draw_images(loop, iteration, agents, sampler, measure, draw)


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
        merged=explore.merge_lora,
    )
    units = make_units(agents, requests, explore.batch_size)
    share = len(units[loop.world.rank :: loop.world.size])
    if loop.world.rank == 0:
        loop.store.discard_incomplete("collect", iteration)
    loop.world.barrier()
    began = time.monotonic()
    with ticking(loop, f"collect {iteration}", share * (sampler.steps + 1), "batches") as tick:
        collect_units(
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
        payload: dict[str, float] = {"explore/tau": rate} | drawn | conflicts | dict(extra)
        payload["cost/network_evaluations"] = sampling_cost(config, len(rows))
        payload["time/collect_s"] = time.monotonic() - began
        loop.metrics.write_once(iteration, "collect", payload)
        loop.store.write_manifest("collect", iteration, payload)
        for name, disagreement in conflicts.items():
            couple, _, what = name.removeprefix("rollout/conflict/").rpartition("/")
            if what == "disagreement":
                part = f"{disagreement:.0%} of image couples"
                loop.console.line(f"iteration {iteration}: rewards {couple} order {part} oppositely")
    loop.world.barrier()


def aspect_shares(loop: Loop) -> list[float]:
    """How often each of the policy's sizes is drawn at, as `explore.aspect` says; one number where there is
    no choice."""
    aspect, count = loop.config.explore.aspect, len(latent_shapes(loop.policy))
    if aspect == "first" or count == 1:
        return [1.0]
    if aspect == "uniform":
        return [1.0] * count
    report: Any = loop.store.manifest("offline", 0)["report"]
    return [float(report["sizes"].get(size_name(*size), 0)) for size in image_sizes(loop.policy)]


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
    names = list(samples[0].scores)
    for name in names:
        values = np.array([sample.scores[name] for sample in samples], dtype=np.float64)
        good = np.isfinite(values)
        metrics[f"rollout/reward/{name}/mean"] = float(values[good].mean()) if good.any() else float("nan")
        metrics[f"rollout/reward/{name}/std"] = float(values[good].std()) if good.any() else float("nan")
        metrics[f"rollout/reward/{name}/failed"] = int((~good).sum())
    shown = ranked if ranked in names else next(iter(names), "")
    for agent in dict.fromkeys(sample.agent for sample in samples if names):
        own = np.array(
            [sample.scores[shown] for sample in samples if sample.agent == agent], dtype=np.float64
        )
        metrics[f"rollout/agent/{agent}/reward"] = (
            float(np.nanmean(own)) if np.isfinite(own).any() else float("nan")
        )
    return metrics
