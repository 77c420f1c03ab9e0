r"""Which scored images an iteration learns from, and the batch of any step (see `draws`).

    advantage of an image = how much better its reward is than those of all images of its prompt and
    collection

An image's advantage is computed over its whole group when the index is made, so it does not depend on which
batch, process or micro-batch the image falls into.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch

from diffexpo.config.schema import HybridConfig
from diffexpo.data.draws import CollectedRef, Draws, Index, Loader, hybrid_weights, positions_by
from diffexpo.data.latents import PromptEmbeddings, stacked
from diffexpo.data.rows import Preference
from diffexpo.data.sharing import UnreadRows
from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.types import ScoredBatch

Keep = Literal["all", "decided", "desirable", "best"]
Mix = Callable[[Mapping[str, np.ndarray]], np.ndarray]
Advantages = Callable[[np.ndarray, Sequence[int]], np.ndarray]
Weigh = Callable[[np.ndarray], np.ndarray]

# Groups of a collection are numbered from its iteration times this.
_GROUPS = 10**9


@dataclass(frozen=True, slots=True)
class _Scored:
    """A view of `Sample`: what is read of a collected image."""

    sample_id: str
    group: int
    prompt: str
    rewards: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ScoredRef(CollectedRef):
    """What training needs to know of a stored image before its latents are read."""

    sample_id: str
    group: int
    reward: float
    advantage: float
    desirable: bool
    is_best: bool
    weight: float | None = None


@dataclass(frozen=True)
class ScoredIndex(Index[ScoredRef]):
    """Images with their sampling weights, all positive; the images of a group are consecutive."""

    dropped_failed: int = 0
    is_scored: bool = True


@dataclass(eq=False)
class ScoredSource:
    """All images with a score: those of D_off's pairs and those collected so far, by weight.

    Args:
        hybrid: Weights by source and age, as for pairs.
        mix: Scores by reward (G, n) to one score (G, n), NaN where an image has none; None: images need no
            score, and all have 0.
        advantages: (rewards (N,), N group numbers) to advantages (N,).
        keep: Images that are learned from: all; those whose advantage is not 0 (`decided`); those better than
            their prompt's mean (`desirable`); the best of each prompt.
        desirable_fraction: Share of desirable images in the draw; None leaves it as it is.
        weigh: Rewards (n,) of scored images to the weights (n,) of their losses; None: all 1.
        weigh_scope: What `weigh` is called with: the images of one prompt, or all of a collection.
        sizes: Image sizes by sample id, where there are several (`Store.sizes`).
    """

    store: Store
    hybrid: HybridConfig
    mix: Mix | None
    advantages: Advantages
    _: KW_ONLY
    keep: Keep = "all"
    desirable_fraction: float | None = None
    weigh: Weigh | None = None
    weigh_scope: Literal["prompt", "global"] = "prompt"
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def index(self, iteration: int) -> ScoredIndex:
        """Images that iteration t trains on: those of D_off and of the collections 1 .. t-1.

        An offline image is desirable if it won a pair; its reward is the share of its pairs that it won, its
        group the images of its prompt and size in D_off. A collected image is desirable if its advantage is
        positive; its group is its request. Images without a finite score are left out and counted.

        Later collections are not read, whatever the store holds. The result has images of positive weight, by
        collection and group. While nothing is collected yet, D_off weighs 1. A DataError is raised when no
        image is left.
        """
        collected = [k for stage, k in self.store.completed() if stage == "collect" and 1 <= k < iteration]
        found = [ref for k in collected for ref in self._collected(k)]
        scored = [ref for ref in found if np.isfinite(ref.reward)]
        dropped = len(found) - len(scored)
        refs = self._weighed(self._offline() + scored)
        iterations = np.array([ref.iteration for ref in refs], np.int64)
        is_offline = np.array([ref.source == "offline" for ref in refs], bool)
        weights = hybrid_weights(self.hybrid, iterations, is_offline, max(collected, default=None))
        kept = [i for i, ref in enumerate(refs) if weights[i] > 0 and _KEPT[self.keep](ref)]
        if not kept:
            raise DataError(
                f"iteration {iteration} has no images to train on ({len(refs)} scored in the store, "
                f"{dropped} failed; none kept of positive weight, keep is {self.keep!r}): set "
                "offline.source, or check the rewards"
            )
        chosen, counted = _without_weightless([refs[i] for i in kept])
        return ScoredIndex(
            chosen, self._balanced(chosen, weights[kept][counted]), dropped, self.mix is not None
        )

    def _offline(self) -> list[ScoredRef]:
        pairs = self.store.pairs(source="offline", view=Preference)
        won = Counter(pair.winner_id for pair in pairs)
        seen = won + Counter(pair.loser_id for pair in pairs)
        prompts = {name: pair.prompt for pair in pairs for name in (pair.winner_id, pair.loser_id)}
        # Images of one group share noise in some methods, so they share a size; the pairs of a prompt may
        # have several.
        groups = {name: (prompt, self.sizes.get(name)) for name, prompt in prompts.items()}
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
        names = sorted(prompts, key=lambda name: (numbers[groups[name]], name))
        refs = [
            ScoredRef(
                0, "offline", prompts[name], name, numbers[groups[name]], won[name] / seen[name], 0.0,
                desirable=won[name] > 0, is_best=won[name] > 0,
            )
            for name in names
        ]  # fmt: skip
        return self._with_advantages(refs)

    def _collected(self, iteration: int) -> list[ScoredRef]:
        samples = self.store.samples(iteration, view=_Scored)
        names = list(samples[0].rewards) if samples and self.mix is not None else []
        samples.sort(key=lambda sample: (sample.group, sample.sample_id))
        groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.group)]
        rewards = {name: [[sample.rewards[name] for sample in group] for group in groups] for name in names}
        scores = {name: np.array(values, np.float64) for name, values in rewards.items()}
        mixed = [[0.0] * len(group) for group in groups] if self.mix is None else self.mix(scores)
        refs = []
        for group, values in zip(groups, mixed, strict=True):
            best = int(np.nanargmax(values)) if np.isfinite(values).any() else -1
            refs += [
                ScoredRef(
                    iteration, "online", sample.prompt, sample.sample_id, iteration * _GROUPS + sample.group,
                    float(values[place]), 0.0, desirable=False, is_best=place == best,
                )
                for place, sample in enumerate(group)
            ]  # fmt: skip
        return [replace(ref, desirable=ref.advantage > 0) for ref in self._with_advantages(refs)]

    def _with_advantages(self, refs: list[ScoredRef]) -> list[ScoredRef]:
        if not refs:
            return []
        advantages = self.advantages(np.array([ref.reward for ref in refs]), [ref.group for ref in refs])
        return [replace(ref, advantage=float(value)) for ref, value in zip(refs, advantages, strict=True)]

    def _weighed(self, refs: list[ScoredRef]) -> list[ScoredRef]:
        """The images with the weights of their losses; those of a scope are weighed together."""
        if self.weigh is None:
            return refs
        scope = (lambda ref: ref.group) if self.weigh_scope == "prompt" else (lambda ref: ref.iteration)
        weighed = []
        for positions in positions_by(refs, scope):
            group = [refs[i] for i in positions]
            weights = self.weigh(np.array([ref.reward for ref in group], dtype=np.float64))
            weighed += [replace(ref, weight=float(w)) for ref, w in zip(group, weights, strict=True)]
        return weighed

    def _balanced(self, refs: tuple[ScoredRef, ...], weights: np.ndarray) -> np.ndarray:
        """Weights under which desirable images have their share of the draw (if both kinds are there)."""
        desirable = np.array([ref.desirable for ref in refs])
        if self.desirable_fraction is None or desirable.all() or not desirable.any():
            return weights
        share = np.where(desirable, self.desirable_fraction, 1 - self.desirable_fraction)
        total = np.where(desirable, weights[desirable].sum(), weights[~desirable].sum())
        return weights * share / total


_KEPT: dict[Keep, Callable[[ScoredRef], bool]] = {
    "all": lambda ref: True,
    "decided": lambda ref: ref.advantage != 0,
    "desirable": lambda ref: ref.desirable,
    "best": lambda ref: ref.is_best,
}


@dataclass(eq=False)
class ScoredLoader(Loader):
    """Batches of images.

    Args:
        index: Images and weights, from `ScoredSource.index`.
        whole_groups: Draw groups instead of images: a batch then holds all images of each of its groups.
        sizes: Image sizes by sample id, where there are several (`Store.sizes`).
    """

    store: Store
    index: ScoredIndex
    embeddings: PromptEmbeddings
    _: KW_ONLY
    whole_groups: bool = False
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refs = self.index.refs
        self.size = len(refs)
        self._draws = Draws(
            refs,
            self.index.weights,
            self.name(),
            self.batch_size,
            units=positions_by(refs, lambda ref: ref.group) if self.whole_groups else None,
            sizes=self.sizes,
            sample_id=lambda ref: ref.sample_id,
        )

    def describe(self) -> str:
        """One line for a person: how many images from where."""
        failed = self.index.dropped_failed
        if not self.index.is_scored:
            return f"{self.size} images ({self.index.by_source()})"
        return (
            f"{self.size} images ({self.index.by_source()}; {sum(ref.desirable for ref in self.index.refs)} "
            f"desirable{f'; {failed} without a score left out' if failed else ''})"
        )

    def row_names(self) -> list[str]:
        return [f"{ref.sample_id} {ref.advantage!r}" for ref in self.index.refs]

    def row_weights(self) -> np.ndarray:
        return self.index.weights

    def batch(self, step: int) -> ScoredBatch:
        """The batch of a step (from 0); reads only its latents.

        Whole groups are numbered by their place in the sequence of draws: a group that is drawn twice for one
        batch counts as two.
        """
        return self._batch(step, is_read=True)

    def unread_batch(self, step: int) -> ScoredBatch:
        """The batch of a step, which is read as it is cut; of several image sizes it is read at once."""
        return self._batch(step, is_read=bool(self.sizes))

    def _batch(self, step: int, is_read: bool) -> ScoredBatch:
        drawn = self._draws.batch(step)
        refs = [row.ref for row in drawn]
        groups = [row.number if self.whole_groups else row.ref.group for row in drawn]
        has_weights = refs[0].weight is not None
        ids, texts = [ref.sample_id for ref in refs], [ref.prompt for ref in refs]
        latents: Any = UnreadRows(
            len(ids), lambda start, stop: stacked(self.store.stretches(ids[start:stop]))
        )
        conditioning: Any = UnreadRows(
            len(ids), lambda start, stop: self.embeddings.select(texts[start:stop])
        )
        return ScoredBatch(
            latents=latents[:] if is_read else latents,
            conditioning=conditioning[:] if is_read else conditioning,
            keys=tuple(f"{row.ref.sample_id}@{row.epoch}" for row in drawn),
            rewards=torch.tensor([ref.reward for ref in refs], dtype=torch.float32),
            advantages=torch.tensor([ref.advantage for ref in refs], dtype=torch.float32),
            groups=torch.tensor(groups, dtype=torch.int64),
            desirable=torch.tensor([ref.desirable for ref in refs]),
            weight=torch.tensor([ref.weight for ref in refs], dtype=torch.float32) if has_weights else None,
            is_grouped=self.whole_groups,
        )


def _without_weightless(refs: list[ScoredRef]) -> tuple[tuple[ScoredRef, ...], np.ndarray]:
    """Images whose loss has a weight, and which they are; one of weight 0 costs a forward for nothing."""
    counted = np.array([ref.weight != 0 for ref in refs])
    # the weights that stay are scaled, so that the mean over a draw is what it was
    share = float(counted.mean())
    if share == 1:
        return tuple(refs), counted
    chosen = (ref for ref, counts in zip(refs, counted, strict=True) if counts)
    return tuple(replace(ref, weight=share * float(ref.weight or 0)) for ref in chosen), counted
