"""Many images through many scorers: quantised once, in batches; a failure is a NaN, never a number."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.rewards.card import SCORING_BATCH
from diffexpo.errors import PolicyError, RewardError, ScorerStoppedError
from diffexpo.phases import phase
from diffexpo.rewards.images import quantise
from diffexpo.types import Drawn, Reward

_log = logging.getLogger("diffexpo")


class Budget:
    """How many of the last images may be no finite numbers: single ones are left out, but where they are a
    quarter, and at least four, the model is broken and what is left says nothing of it.

    Args:
        who: The model, for the message.
    """

    LAST, SHARE, LEAST = 64, 0.25, 4

    def __init__(self, who: str) -> None:
        self.who = who
        self._last: deque[bool] = deque(maxlen=self.LAST)

    def count(self, broken: np.ndarray) -> None:
        """Count images (N,), true for one that is not finite; a PolicyError where they are too many."""
        self._last.extend(bool(one) for one in broken)
        number = sum(self._last)
        if number >= max(self.LEAST, self.SHARE * len(self._last)):
            raise PolicyError(
                f"{number} of the last {len(self._last)} images of {self.who} are not finite numbers: the "
                "model is broken, or training has diverged. If its base draws sound images, start a new run "
                "with a lower training.learning_rate (or model.dtype=bfloat16 instead of float16)"
            )


@phase("scoring images")
def score_drawn(
    scorers: Sequence[Reward],
    drawn: Drawn,
    prompts: Sequence[str],
    *,
    batch_size: int = SCORING_BATCH,
    tick: Callable[[], None] = lambda: None,
    budget: Budget | None = None,
) -> dict[str, np.ndarray]:
    """Scores of what was drawn under every scorer, each given what it reads.

    Images are rounded to 8 bits once, before any scorer: what was scored is what a saved PNG shows. A batch
    whose scorer raises RewardError is scored again image by image, so that one bad image costs one row.

    Args:
        scorers: Scorers of images and of latents.
        drawn: N latents and their images, for N `prompts`; what no scorer reads may be None.
        budget: Counts the images that are not finite, and stops where they are too many.
        batch_size: Rows per call of a scorer; `tick` is called after each.
    Returns:
        name -> (N,) float32, NaN where scoring failed or was not finite; `num_failed` counts them.
    Raises:
        RewardError: prompts differ in number from what was drawn.
        ScorerStoppedError: a scorer cannot go on, such as one whose server does not return.
        PolicyError: the budget is spent.
    """
    images = None if drawn.images is None else quantise(drawn.images)
    scores = {}
    for scorer in scorers:
        read = drawn.latents if reads_latents(scorer) else images
        assert read is not None  # the caller knows its scorers
        if len(read) != len(prompts):
            advice = "expected one prompt an image"
            raise RewardError(f"scoring: {len(read)} images but {len(prompts)} prompts; {advice}")
        scores[scorer.name] = np.full(len(prompts), np.nan, dtype=np.float32)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, min(start + batch_size, len(prompts)))
            # A copy for each: what a scorer does to its images is not seen by the next.
            scores[scorer.name][rows] = _score_batch(scorer, read[rows].clone(), prompts[rows])
            tick()
    broken = _broken_rows(drawn)
    for values in scores.values():
        values[broken] = np.nan
    if broken.any():
        text = "%d of %d images are not finite numbers: the model that drew them is broken or has diverged"
        _log.warning(text, int(broken.sum()), len(prompts))
    if budget is not None:
        budget.count(broken)
    for name, count in num_failed(scores).items():
        if count:
            text = "reward %r gave no finite score for %d of %d images; they are excluded"
            _log.warning(text, name, count, len(prompts))
    return scores


def _broken_rows(drawn: Drawn) -> np.ndarray:
    """Mask (N,) of rows whose latents or images hold something that is no finite number, whatever a scorer
    makes of them."""
    masks = [
        ~torch.isfinite(rows).flatten(1).all(dim=1)
        for rows in (drawn.latents, drawn.images)
        if rows is not None
    ]
    return torch.stack([mask.to(masks[0].device) for mask in masks]).any(dim=0).cpu().numpy()


def reads_latents(scorer: Reward) -> bool:
    """Whether a scorer is given latents as they were drawn, instead of images."""
    return getattr(scorer, "reads", "images") == "latents"


def num_failed(scores: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Rows without a finite score, by scorer."""
    return {name: int((~np.isfinite(values)).sum()) for name, values in scores.items()}


def check_rewards(scores: Mapping[str, np.ndarray]) -> None:
    """Start-up self-check of the train rewards: refuse, with a RewardError, a scorer that gave no finite
    score at all, or the same one for every image: it ranks nothing."""
    for name, values in scores.items():
        finite = np.asarray(values)[np.isfinite(values)]
        if finite.size == 0:
            reason = f"none of {np.size(values)} images got a finite score"
            raise RewardError(f"reward {name!r}: {reason}; look at the warnings above and correct the scorer")
        if finite.size > 1 and np.ptp(finite) == 0:
            advice = "a constant reward ranks nothing, use another"
            raise RewardError(f"reward {name!r}: all {finite.size} images got {finite[0]:.6g}; {advice}")


def _score_batch(scorer: Reward, inputs: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """Scores of a batch, NaN where the scorer fails on a row alone."""
    try:
        scores = scorer.score(inputs, prompts)
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {scorer.name!r} returned shape {tuple(scores.shape)} for {len(prompts)} images"
            )
    except ScorerStoppedError:
        raise
    except RewardError as error:
        if len(prompts) == 1:
            _log.warning("%s", error)
            return np.full(1, np.nan, dtype=np.float32)
        rows = [slice(row, row + 1) for row in range(len(prompts))]
        return np.concatenate([_score_batch(scorer, inputs[row], prompts[row]) for row in rows])
    scores = scores.detach().float().cpu()
    return torch.where(torch.isfinite(scores), scores, torch.nan).numpy()
