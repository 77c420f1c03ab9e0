"""The collect stage: agents draw images for an iteration's prompts, rewards score them, the store keeps
them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from diffexpo.config.methods.data import Images
from diffexpo.data.images import size_name
from diffexpo.data.latents import image_sizes, latent_shapes
from diffexpo.data.rows import Sample
from diffexpo.online.agents import make_agents
from diffexpo.online.cost import sampling_cost
from diffexpo.online.credit import reward_metrics, stack_rewards
from diffexpo.online.explore import SCHEDULES, attach_negatives, choose_buckets, draw_prompts
from diffexpo.online.loop import Loop, draw_stage, is_complete, load_iterate, load_iterates
from diffexpo.online.trajectories import branch_metrics, draw_and_keep, iteration_sampler, trajectories_of
from diffexpo.online.units import Drawing, group_rows, latents_of_unit, make_units, texts_needed
from diffexpo.online.units import collect as collect_units


def collect(loop: Loop, iteration: int) -> None:
    """Draw and score this iteration's images, with both agents, or with the newest policy alone where the
    method learns from its trajectories, which are kept until they are trained. The manifest, written last,
    makes the stage complete."""
    if is_complete(loop, "collect", iteration):
        return
    config, card, world = loop.config, loop.config.algorithm, loop.world
    explore, negatives = config.explore, config.explore.negatives
    sampler, draw, draws_first = explore.sampler, latents_of_unit, card.draws_first
    if draws_first:
        load_iterate(loop, iteration - 1, "current")
        sampler = iteration_sampler(loop, iteration)
        draw = partial(draw_and_keep, loop, trajectories_of(loop, iteration))
    else:
        load_iterates(loop, iteration)
    agents = make_agents(loop.policy.weights, explore, draws_first=draws_first, drawn_by=card.drawn_by)
    rate = SCHEDULES[negatives.schedule](iteration, explore.iterations, negatives.initial)
    prompts = draw_prompts(loop.prompts, iteration, explore.prompts_per_iteration, config.seed)
    requests = attach_negatives(prompts, loop.negatives, rate, iteration, config.seed)
    requests = choose_buckets(requests, aspect_shares(loop), config.seed)
    append = negatives.mode == "append"
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
    draw_stage(
        loop,
        "collect",
        iteration,
        len(units[world.rank :: world.size]) * (sampler.steps + 1),
        lambda tick: collect_units(
            drawing,
            units,
            loop.store,
            rank=world.rank,
            size=world.size,
            tick=tick,
            draw=draw,
            overlap=explore.overlap_scoring,
        ),
        lambda: _measure(loop, iteration, rate),
    )


def _measure(loop: Loop, iteration: int, rate: float) -> dict[str, float]:
    """What is to be known of an iteration's images; a RewardError where scores cannot rank anything."""
    card, rows = loop.config.algorithm, loop.store.collected(iteration)
    groups = group_rows(rows)
    # Later rewards of a trajectory method may be equal: then nothing is trained, which is said.
    if iteration == 1 or not card.draws_first:
        loop.ranking.check(stack_rewards(groups))
    # The first reward that ranks is the one by which agents are compared.
    ranked = next((reward.name for reward in loop.config.rewards if reward.role == "train"), None)
    conflicts = loop.ranking.conflicts(stack_rewards(groups))
    for name, disagreement in conflicts.items():
        couple, _, what = name.removeprefix("rollout/conflict/").rpartition("/")
        if what == "disagreement":
            part = f"{disagreement:.0%} of image couples"
            loop.console.line(f"iteration {iteration}: rewards {couple} order {part} oppositely")
    metrics = {"explore/tau": rate} | collection_metrics(rows, ranked) | dict(conflicts)
    # Pairs are counted when they are made.
    if card.is_ranked and (card.draws_first or isinstance(card.data, Images)):
        metrics |= reward_metrics(loop, groups)
    metrics |= branch_metrics(loop, iteration, rows)
    return metrics | {"cost/network_evaluations": sampling_cost(loop.config, len(rows))}


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
        good = values[np.isfinite(values)]
        metrics[f"rollout/reward/{name}/mean"] = float(good.mean()) if good.size else float("nan")
        metrics[f"rollout/reward/{name}/std"] = float(good.std()) if good.size else float("nan")
        metrics[f"rollout/reward/{name}/failed"] = values.size - good.size
    shown = ranked if ranked in names else next(iter(names), "")
    for agent in dict.fromkeys(sample.agent for sample in samples if names):
        own = np.array([sample.scores[shown] for sample in samples if sample.agent == agent])
        mean = float(np.nanmean(own)) if np.isfinite(own).any() else float("nan")
        metrics[f"rollout/agent/{agent}/reward"] = mean
    return metrics
