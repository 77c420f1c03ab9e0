"""The pair stage: what was drawn becomes pairs, in the way that the method's card names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from diffexpo.data.rows import Sample
from diffexpo.online.credit import stack_rewards
from diffexpo.online.improved_pairs import make_improved_pairs
from diffexpo.online.loop import Loop, Ranking, is_complete
from diffexpo.online.pairing import Paired, make_pairs
from diffexpo.online.self_play import data_images, make_self_pairs
from diffexpo.online.units import group_rows
from diffexpo.training.metrics import peak_memory

Groups = Sequence[Sequence[Sample]]


def pair(loop: Loop, iteration: int) -> None:
    """Make the iteration's pairs; the manifest, written last, makes the stage complete."""
    if is_complete(loop, "pair", iteration):
        return
    if loop.world.rank == 0:
        began = time.monotonic()
        loop.store.discard_incomplete("pair", iteration)
        groups = group_rows(loop.store.samples(iteration))
        paired = PAIRINGS[loop.config.algorithm.pairing](loop, groups, iteration)
        loop.store.append_pairs(iteration, 0, paired.pairs)
        spent = {"time/pair_s": time.monotonic() - began} | peak_memory()
        loop.metrics.write_once(iteration, "pair", paired.metrics() | spent)
        loop.store.write_manifest("pair", iteration, paired.metrics())
        loop.console.line(f"iteration {iteration}: {paired.describe()}")
    loop.world.barrier()


def _ranked(loop: Loop, groups: Groups, iteration: int) -> Paired:
    """The best against the worst of each prompt's images."""
    scores, ranking = stack_rewards(groups), loop.ranking
    return make_pairs(
        groups,
        ranking.mix(scores),
        iteration=iteration,
        seed=loop.config.seed,
        judge=ranking.judge,
        min_margin=loop.config.pairing.min_margin,
        dominance=ranking.dominance(scores) if ranking.dominance else None,
        uncertainty=ranking.uncertainty(scores) if ranking.uncertainty else None,
    )


def _against_data(loop: Loop, groups: Groups, iteration: int) -> Paired:
    """Images of the offline data against the model's own."""
    return make_self_pairs(groups, data_images(loop.store), iteration=iteration, seed=loop.config.seed)


def _improved(loop: Loop, groups: Groups, iteration: int) -> Paired:
    """Improved images against those that they were made from."""
    return make_improved_pairs(
        groups,
        loop.store.latent,
        iteration=iteration,
        score=partial(_gaps, loop.ranking) if loop.config.algorithm.filters_by_reward else None,
        min_margin=loop.config.pairing.min_margin,
    )


PAIRINGS: dict[str, Callable[[Loop, Groups, int], Paired]] = {
    "ranked": _ranked,
    "data": _against_data,
    "improved": _improved,
}


def _gaps(ranking: Ranking, couples: Groups) -> np.ndarray:
    """Mixed score (P,) of the first image of each couple above the second; with Pareto 0 at most where
    one reward does not agree."""
    scores = stack_rewards(couples)
    mixed = ranking.mix(scores)
    gaps = mixed[:, 0] - mixed[:, 1]
    if ranking.dominance is not None:
        gaps = np.where(ranking.dominance(scores)[:, 0, 1], gaps, np.minimum(gaps, 0.0))
    return gaps
