r"""Advantages: how much better an image is than what its prompt usually gets. NumPy float64, without torch.

    A_i = (r_i - mean) / (std + floor),   population std

`group_advantages` takes mean and std over the images of one prompt in one collection (GRPO), `PerPromptStats`
over the last rewards of that prompt across collections (DDPO). Sums are exactly rounded, so the order of the
images does not change a bit. A reward that is not finite (its scoring failed) enters no statistics and has
the advantage NaN: the caller drops such images and counts them. Rewards of several processes are gathered
before, as the statistics are of all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from diffexpo.data.draws import positions_by

GROUP_STD_FLOOR = 1e-4
PROMPT_STD_FLOOR = 1e-6


def group_advantages(rewards: ArrayLike, groups: Sequence[Hashable], *, global_std: bool) -> np.ndarray:
    """Advantage of each image within its group.

        A_i = (r_i - mean of the group) / (std + 1e-4)

    Args:
        rewards: (N,) higher is better; NaN or infinite where scoring failed.
        groups: N labels, e.g. prompt ids; equal labels form a group, wherever they stand.
        global_std: Population std over all N rewards (True) or within the group (False).
    Returns:
        (N,) float64; each group sums to 0. Rewards 1 and 3 in one group of two: -0.9999 and 0.9999. A group
        of one or of equal rewards gets exactly 0, a failed reward NaN.
    Raises:
        ValueError: rewards are not one-dimensional, or there are not as many labels.
    Source: Flow-GRPO (arXiv 2505.05470), group-relative advantage, and its code (floor 1e-4, `global_std`);
        exclusion of failed rewards and the exact 0 are ours.
    """
    rewards, labels = _checked("group_advantages", rewards, groups, "groups")
    overall = _mean_and_std(_finite(rewards))[1]
    advantages = np.full(rewards.shape, np.nan)
    for members in positions_by(labels, lambda label: label):
        mean, std = _mean_and_std(_finite(rewards[members]))
        advantages[members] = (rewards[members] - mean) / ((overall if global_std else std) + GROUP_STD_FLOOR)
    return np.where(np.isfinite(rewards), advantages, np.nan)


class PerPromptStats:
    """Running rewards of each prompt, and the advantages they give.

        A_i = (r_i - mean) / (std + 1e-6), over the last `buffer_size` rewards of the prompt, the new ones
        included

    Source: DDPO (arXiv 2305.13301), per-prompt normalisation, and its code; it needs no group of images per
    prompt, but prompts that come back. Exclusion of failed rewards and the exact 0 of equal rewards are ours.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        """Start without rewards.

        Args:
            buffer_size: Rewards kept for a prompt, >= 1 (the code: 16 or 32).
            min_count: A prompt with fewer takes mean and std of the whole batch, >= 0 (the code: 16). Above
                `buffer_size` all prompts always do, which is DDPO without tracking.
        Raises:
            ValueError: buffer_size or min_count out of range.
        """
        if buffer_size < 1:
            raise ValueError(f"PerPromptStats: buffer_size is {buffer_size}; expected 1 or more")
        if min_count < 0:
            raise ValueError(f"PerPromptStats: min_count is {min_count}; expected 0 or more")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[Hashable, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: ArrayLike) -> np.ndarray:
        """Append a batch, then return its advantages.

        Args:
            prompts: N prompts; repeats are appended in the order given, and the oldest beyond the buffer drop
                out.
            rewards: (N,) higher is better; NaN or infinite where scoring failed (not appended).
        Returns:
            (N,) float64, NaN where scoring failed. Rewards equal to all that their statistics hold get
            exactly 0.
        Raises:
            ValueError: rewards are not one-dimensional, or there are not as many prompts.
        """
        rewards, labels = _checked("PerPromptStats.update", rewards, prompts, "prompts")
        batch = _mean_and_std(_finite(rewards))
        advantages = np.full(rewards.shape, np.nan)
        for members in positions_by(labels, lambda label: label):
            known = self._rewards.setdefault(labels[members[0]], deque(maxlen=self.buffer_size))
            known.extend(_finite(rewards[members]))
            mean, std = batch if len(known) < self.min_count else _mean_and_std(list(known))
            advantages[members] = (rewards[members] - mean) / (std + PROMPT_STD_FLOOR)
        return np.where(np.isfinite(rewards), advantages, np.nan)


def _checked(
    function: str, rewards: ArrayLike, labels: Sequence[Hashable], name: str
) -> tuple[np.ndarray, list[Hashable]]:
    # float64, as integers would truncate the advantages; plain labels, as those of a tensor hash by identity.
    rewards = np.asarray(rewards, dtype=np.float64)
    plain = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if rewards.ndim != 1 or len(plain) != len(rewards):
        raise ValueError(
            f"{function}: rewards have shape {rewards.shape} and there are {len(plain)} {name}; expected one "
            "reward and one label per image"
        )
    return rewards, plain


def _finite(rewards: np.ndarray) -> list[float]:
    return rewards[np.isfinite(rewards)].tolist()


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population std, exact for equal values: a rounded mean would leave a remainder to divide."""
    if not values:
        return math.nan, math.nan
    if min(values) == max(values):
        return values[0], 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
