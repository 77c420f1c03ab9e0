"""Many images through many scorers: quantised once, in batches; a failure is a NaN that is counted, never a
number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffexpo.errors import RewardError, ScorerStoppedError
from diffexpo.phases import phase
from diffexpo.rewards.base import quantise
from diffexpo.types import LatentReward, Reward, Scorer

_log = logging.getLogger("diffexpo")


@phase("scoring images")
def score_images(
    rewards: Sequence[Reward],
    images: Tensor,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Scores of every image under every scorer.

    Images are rounded to 8 bits once, before any scorer: what was scored is what a saved PNG shows. A batch
    whose scorer raises RewardError is scored again image by image, so that one bad image costs one row.

    Args:
        rewards: Scorers.
        images: (N,3,H,W) in [0,1].
        prompts: N texts.
        batch_size: Images per call of a scorer.
        tick: Called after every scored batch.
    Returns:
        name -> (N,) float32, NaN where scoring failed or was not finite; `num_failed` counts them.
    Raises:
        RewardError: images and prompts differ in number.
        ScorerStoppedError: a scorer cannot go on, such as a server that stays away.
    """
    calls = [(reward.name, reward.score) for reward in rewards]
    return _score_all(calls, quantise(images), prompts, batch_size, tick)


@phase("scoring images")
def score_latents(
    rewards: Sequence[LatentReward],
    latents: Tensor,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Scores of latents (N,C,h,w) under every scorer that judges them; in all else as `score_images`."""
    calls = [(reward.name, reward.score_latents) for reward in rewards]
    return _score_all(calls, latents, prompts, batch_size, tick)


def score_both(
    scorers: Sequence[Scorer], images: Tensor, latents: Tensor, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Scores of images (N,3,H,W) and of the latents (N,C,h,w) behind them, in the order of the scorers."""
    of_pictures, of_latents = by_input(scorers)
    found = score_images(of_pictures, images, prompts) | score_latents(of_latents, latents, prompts)
    return {scorer.name: found[scorer.name] for scorer in scorers}


def by_input(scorers: Sequence[Scorer]) -> tuple[list[Reward], list[LatentReward]]:
    """(scorers of pictures, scorers of latents), each in the given order."""
    of_latents = [scorer for scorer in scorers if isinstance(scorer, LatentReward)]
    return [scorer for scorer in scorers if not isinstance(scorer, LatentReward)], of_latents


def num_failed(scores: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Rows without a finite score, by scorer."""
    return {name: int((~np.isfinite(values)).sum()) for name, values in scores.items()}


def check_rewards(scores: Mapping[str, np.ndarray]) -> None:
    """Start-up self-check of the train rewards on a few images: refuse what cannot rank anything.

    Args:
        scores: name -> scores of two or more different images.
    Raises:
        RewardError: a scorer gave no finite score at all, or the same one for every image.
    """
    for name, values in scores.items():
        finite = np.asarray(values)[np.isfinite(values)]
        if finite.size == 0:
            raise RewardError(
                f"reward {name!r}: none of {np.size(values)} images got a finite score; look at the warnings "
                "above and correct the scorer"
            )
        if finite.size > 1 and np.ptp(finite) == 0:
            raise RewardError(
                f"reward {name!r}: all {finite.size} images got {finite[0]:.6g}; a constant reward ranks "
                "nothing, use another"
            )


Call = Callable[[Tensor, Sequence[str]], Tensor]


def _score_all(
    calls: Sequence[tuple[str, Call]],
    inputs: Tensor,
    prompts: Sequence[str],
    batch_size: int,
    tick: Callable[[], None],
) -> dict[str, np.ndarray]:
    """Scores of pictures or latents under every (name, call); failures become NaN and are said."""
    if len(inputs) != len(prompts):
        raise RewardError(
            f"scoring: {len(inputs)} images but {len(prompts)} prompts; expected one prompt an image"
        )
    scores = {name: np.full(len(prompts), np.nan, dtype=np.float32) for name, _ in calls}
    for name, call in calls:
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, min(start + batch_size, len(prompts)))
            scores[name][rows] = _score_batch(name, call, inputs[rows], prompts[rows])
            tick()
    for name, count in num_failed(scores).items():
        if count:
            _log.warning(
                "reward %r gave no finite score for %d of %d images; they are excluded",
                name,
                count,
                len(prompts),
            )
    return scores


def _score_batch(name: str, call: Call, images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    try:
        scores = call(images, prompts)
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {name!r} returned shape {tuple(scores.shape)} for {len(prompts)} images"
            )
    except ScorerStoppedError:
        raise
    except RewardError as error:
        if len(prompts) == 1:
            _log.warning("%s", error)
            return np.full(1, np.nan, dtype=np.float32)
        rows = range(len(prompts))
        return np.concatenate(
            [_score_batch(name, call, images[row : row + 1], prompts[row : row + 1]) for row in rows]
        )
    scores = scores.detach().float().cpu()
    return torch.where(torch.isfinite(scores), scores, torch.nan).numpy()
