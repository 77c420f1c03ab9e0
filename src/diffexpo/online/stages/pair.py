"""The pair stage: what was drawn becomes pairs, in the way that the method's card names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from diffexpo.data.rows import Pair, Sample
from diffexpo.online.credit import stack_rewards
from diffexpo.online.improved_pairs import make_improved_pairs
from diffexpo.online.loop import Loop, is_complete
from diffexpo.online.pairing import PairingReport, make_pairs
from diffexpo.online.self_play import data_images, make_self_pairs
from diffexpo.online.units import group_rows

Groups = Sequence[Sequence[Sample]]
Paired = tuple[list[Pair], PairingReport]


def pair(loop: Loop, iteration: int) -> PairingReport | None:
    """Make the iteration's pairs; the manifest, written last, makes the stage complete."""
    if is_complete(loop, "pair", iteration):
        return None
    report = None
    if loop.world.rank == 0:
        loop.store.discard_incomplete("pair", iteration)
        groups = group_rows(loop.store.samples(iteration))
        pairs, report = PAIRINGS[loop.config.algorithm.pairing](loop, groups, iteration)
        loop.store.append_pairs(iteration, 0, pairs)
        loop.metrics.write_once(iteration, "pair", report.metrics())
        loop.store.write_manifest("pair", iteration, report.metrics())
        loop.console.line(f"iteration {iteration}: {report.describe()}")
    loop.world.barrier()
    return report


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
    filters = loop.config.algorithm.filters_by_reward
    return make_improved_pairs(
        groups,
        loop.store.latent,
        iteration=iteration,
        score=(lambda couples: _gaps(loop, couples)) if filters else None,
        min_margin=loop.config.pairing.min_margin,
    )


PAIRINGS: dict[str, Callable[[Loop, Groups, int], Paired]] = {
    "ranked": _ranked,
    "data": _against_data,
    "improved": _improved,
}


def _gaps(loop: Loop, groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    """Mixed score (G,) of the first image of each couple above the second; with Pareto NaN where one reward
    does not agree."""
    scores = stack_rewards(groups)
    mixed = loop.ranking.mix(scores)
    gaps = mixed[:, 0] - mixed[:, 1]
    if loop.ranking.dominance is not None:
        gaps = np.where(loop.ranking.dominance(scores)[:, 0, 1], gaps, np.minimum(gaps, 0.0))
    return gaps
