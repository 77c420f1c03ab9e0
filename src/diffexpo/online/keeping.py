"""Which iterate is a run's result, and where the run ends: decided by validation scores alone, which the
store has in the manifests of the stage "validate". `store` is the store's folder.

    keep: last   p_T
    keep: best   p_k with the highest mean score; of equal ones the earliest

Loads without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffexpo.config.methods.card import Run
from diffexpo.data.manifests import read_manifests
from diffexpo.errors import MissingError

STAGE, MEAN = "validate", "mean"


def best_iterate(means: Mapping[int, float]) -> int:
    """The iterate with the highest mean score, of equal ones the earliest: `best_iterate({1: 0.2, 2: 0.5, 3:
    0.5})` is 2."""
    return max(sorted(means), key=lambda iteration: means[iteration])


def is_over(means: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` iterations brought no better score than the ones before them: with patience
    2 `{1: 0.5, 2: 0.4, 3: 0.5}` is over. None: never."""
    return patience is not None and max(means) - best_iterate(means) >= patience


def validated(store: Path) -> dict[int, float]:
    """Mean score of every iterate that is validated, in order; none where the store is not there."""
    return {iteration: float(found[MEAN]) for iteration, found in read_manifests(store, STAGE).items()}


def last_iteration(config: Run, store: Path) -> int:
    """The iteration with which a run ends: the planned one, or an earlier one where its patience is at an
    end."""
    explore = config.explore
    if explore.keep == "last" or explore.patience is None:
        return explore.iterations
    means = validated(store)
    over = (k for k in means if is_over({j: means[j] for j in means if j <= k}, explore.patience))
    return next(over, explore.iterations)


def kept_iterate(config: Run, store: Path) -> int:
    """The iterate that is the result of a run which came to its end; a MissingError where the validation of
    its last iterate is missing."""
    last = last_iteration(config, store)
    if config.explore.keep == "last":
        return last
    means = validated(store)
    if last not in means:
        raise MissingError(
            f"iteration {last} of the run with the store {store} is not validated, so none is chosen yet; "
            "finish it with `diffexpo run --resume`"
        )
    return best_iterate(means)
