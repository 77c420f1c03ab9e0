r"""Exploring: which prompts an iteration draws, and which of them carry a negative prompt.

    tau(t) = tau_0 * max(0, 1 - (t - 1) / (T - 1))          linear decay, t = 1 .. T

A prompt gets a negative prompt with probability tau(t), so the search is wide early and the late data are on
the policy's own ground. The papers fix the linear shape and leave tau_0 and the list of negative prompts
open; we take tau_0 = 1. In mode `cfg` the negative prompt replaces the empty prompt in classifier-free
guidance; in mode `append` its words are added to the prompt. The *training* prompt is the plain one in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffexpo.errors import ConfigError
from diffexpo.rng import keyed_choice, keyed_order, keyed_uniform
from diffexpo.types import Prompt


def linear_decay(iteration: int, iterations: int, initial: float) -> float:
    """Rate tau(t) that falls linearly from `initial` at iteration 1 to 0 at the last one.

        tau(t) = initial * max(0, 1 - (t - 1) / (T - 1))

    Args:
        iteration: t, counted from 1.
        iterations: T; with T = 1 the rate is `initial`.
        initial: tau_0 in [0, 1].
    Returns:
        A probability; linear_decay(2, 5, 1.0) = 0.75.
    Raises:
        ConfigError: t < 1 or T < 1.
    Source: EXPO, section 5.2 ("linear decay"); values are ours.
    """
    return initial * (1.0 - _progress(iteration, iterations))


def cosine_decay(iteration: int, iterations: int, initial: float) -> float:
    """Rate that falls along half a cosine from `initial` at iteration 1 to 0 at the last; 0.5 * initial
    half-way."""
    return initial * 0.5 * (1.0 + math.cos(math.pi * _progress(iteration, iterations)))


def constant(iteration: int, iterations: int, initial: float) -> float:
    """The same rate in every iteration (the papers' ablation: over-saturates colours late)."""
    _progress(iteration, iterations)
    return initial


def off(iteration: int, iterations: int, initial: float) -> float:
    """No negative prompts: 0 in every iteration."""
    _progress(iteration, iterations)
    return 0.0


SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "linear": linear_decay,
    "cosine": cosine_decay,
    "constant": constant,
    "off": off,
}


@dataclass(frozen=True)
class Request:
    """One prompt to draw images for, the negative prompt it carries (None: the empty prompt guides) and the
    number of its images' size among the policy's, which they share: a ranking of shapes says nothing."""

    prompt: Prompt
    negative: str | None
    bucket: int = 0


def draw_prompts(prompts: Sequence[Prompt], iteration: int, count: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration: the next `count` of a stream of keyed permutations, so none repeats while
    they last.

    Args:
        prompts: The pool; ids are unique.
        iteration: Collecting iteration, from 1.
        count: Prompts an iteration draws, with another pass if the pool is smaller.
        seed: Run seed.
    Raises:
        ConfigError: the pool is empty.
    """
    if not prompts:
        raise ConfigError(
            "prompts: the pool is empty after filtering - expected at least one prompt; check prompts.source"
        )
    by_id = {prompt.id: prompt for prompt in prompts}
    first, last = (iteration - 1) * count, iteration * count
    drawn: list[Prompt] = []
    for turn in range(first // len(by_id), (last - 1) // len(by_id) + 1):
        order = keyed_order(by_id, seed, "prompts", turn)
        start = max(first - turn * len(order), 0)
        drawn += [by_id[key] for key in order[start : last - turn * len(order)]]
    return drawn


def attach_negatives(
    prompts: Sequence[Prompt], negatives: Sequence[str], rate: float, iteration: int, seed: int
) -> list[Request]:
    """One request a prompt, in order; each gets one of the negative prompts D_N, or its own (`own_negative`),
    if there are any, with probability `rate` = tau(t) in [0, 1], keyed by prompt and position."""
    requests = []
    for position, prompt in enumerate(prompts):
        key = (seed, iteration, "negative", prompt.id, position)
        own = own_negative(prompt)
        pool = negatives if own is None else [own]
        chosen = bool(pool) and keyed_uniform(*key, "use") < rate
        negative = pool[keyed_choice(len(pool), *key, "which")] if chosen else None
        requests.append(Request(prompt, negative))
    return requests


def own_negative(prompt: Prompt) -> str | None:
    """The `negative_prompt` that a prompt file gives with a prompt, if any."""
    return prompt.attributes.get("negative_prompt", "").strip() or None


def choose_buckets(requests: Sequence[Request], shares: Sequence[float], seed: int) -> list[Request]:
    """Give each request the size of its prompt, drawn with the given shares and keyed by the prompt: the same
    in every iteration.

    `shares` are those of the policy's sizes, not negative; only their ratios matter, and (1, 0) gives all
    requests size 0. One size draws nothing.
    """
    if len(shares) == 1:
        return list(requests)
    ends = np.cumsum(shares)

    def bucket_of(prompt: Prompt) -> int:
        point = keyed_uniform(seed, "aspect", prompt.id) * ends[-1]
        return min(int(np.searchsorted(ends, point, side="right")), len(ends) - 1)

    return [replace(request, bucket=bucket_of(request.prompt)) for request in requests]


def _progress(iteration: int, iterations: int) -> float:
    """Share of the way from iteration 1 to the last one; 0 where there is one only."""
    if iteration < 1 or iterations < 1:
        raise ConfigError(f"iteration {iteration} of {iterations} - expected counting from 1")
    return 0.0 if iterations == 1 else min(1.0, (iteration - 1) / (iterations - 1))
