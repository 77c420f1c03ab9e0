"""From rewards to what is learned from: one reward an image, and the advantage of each image of an
iteration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffexpo.config.methods.data import GroupAdvantage, RunningAdvantage
from diffexpo.data.rows import Sample
from diffexpo.online.advantages import PerPromptStats, group_advantages
from diffexpo.online.loop import Loop
from diffexpo.online.units import group_rows


def stack_rewards(groups: Sequence[Sequence[Sample]]) -> dict[str, np.ndarray]:
    """Rewards of G groups of n samples each: name -> (G, n)."""
    names = list(groups[0][0].scores)
    return {
        name: np.array([[sample.scores[name] for sample in group] for group in groups], dtype=np.float64)
        for name in names
    }


def mixed_rewards(loop: Loop, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    """One reward an image, (G, n); NaN where scoring failed."""
    return np.asarray(loop.ranking.mix(stack_rewards(groups)), dtype=np.float64)


def scored_images(loop: Loop, iteration: int) -> list[tuple[Sample, float]]:
    """Each image of the iteration with its one reward."""
    groups = group_rows(loop.store.samples(iteration))
    images = [sample for group in groups for sample in group]
    return list(zip(images, mixed_rewards(loop, groups).ravel().tolist(), strict=True))


def reward_metrics(loop: Loop, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """How many images cannot teach: those without a finite reward, and those of prompts whose images are all
    equal."""
    rewards = mixed_rewards(loop, groups)
    is_flat = [len(set(row[np.isfinite(row)].tolist())) < 2 for row in rewards]
    return {
        "rollout/advantage/dropped": int((~np.isfinite(rewards)).sum()),
        "rollout/advantage/zero_fraction": float(np.mean(is_flat)),
    }


def image_advantages(
    loop: Loop, iteration: int, kind: RunningAdvantage | GroupAdvantage
) -> list[tuple[Sample, float]]:
    """Each image of the iteration with its advantage, clipped; NaN where scoring failed.

    Running statistics are those of all collections so far, read from the store: there is no state besides it.
    """
    scored = scored_images(loop, iteration)
    if isinstance(kind, RunningAdvantage):
        stats = PerPromptStats(kind.buffer_size, kind.min_count)
        for number in range(1, iteration + 1):
            earlier = scored_images(loop, number)
            prompts = [sample.prompt_id for sample, _ in earlier]
            advantages = stats.update(prompts, [reward for _, reward in earlier])
    else:
        labels = [sample.group for sample, _ in scored]
        rewards = [reward for _, reward in scored]
        advantages = group_advantages(rewards, labels, global_std=kind.global_std)
    clipped = np.clip(advantages, -kind.clip, kind.clip).tolist()
    return [(sample, advantage) for (sample, _), advantage in zip(scored, clipped, strict=True)]
