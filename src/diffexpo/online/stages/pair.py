"""The pair stage: what was drawn becomes pairs, in the way that the method's card names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from diffexpo.data.rows import Sample
from diffexpo.errors import WaitingError
from diffexpo.online.credit import stack_rewards
from diffexpo.online.improved_pairs import make_improved_pairs
from diffexpo.online.loop import Loop, Ranking, is_complete
from diffexpo.online.pairing import Paired, make_pairs
from diffexpo.online.people import HUMAN, AskPeople, Said, add_people
from diffexpo.online.self_play import data_images, make_self_pairs
from diffexpo.online.units import group_rows
from diffexpo.training.metrics import peak_memory

Groups = Sequence[Sequence[Sample]]


def pair(loop: Loop, iteration: int) -> None:
    """Make the iteration's pairs; the manifest, written last, makes the stage complete."""
    if is_complete(loop, "pair", iteration):
        return
    said = _ask(loop, iteration)
    if loop.world.rank == 0:
        began = time.monotonic()
        loop.store.discard_incomplete("pair", iteration)
        groups = group_rows(loop.store.samples(iteration))
        if loop.people is None:
            paired = PAIRINGS[loop.config.algorithm.pairing](loop, groups, iteration)
        else:
            paired = _with_people(loop, loop.people, groups, iteration, said)
        loop.store.append_pairs(iteration, 0, [pair for pair in paired.pairs if pair.source != HUMAN])
        spent = {"time/pair_s": time.monotonic() - began} | peak_memory()
        loop.metrics.write_once(iteration, "pair", paired.metrics() | spent)
        loop.store.write_manifest("pair", iteration, paired.metrics())
        loop.console.line(f"iteration {iteration}: {paired.describe()}")
    loop.world.barrier()


def _ask(loop: Loop, iteration: int) -> Mapping[int, Said]:
    """What people said, on the first process; a WaitingError on all while votes are missing."""
    said: Mapping[int, Said] = {}
    missing: str | None = None
    if loop.people is not None and loop.world.rank == 0:
        try:
            said = loop.people.ask(group_rows(loop.store.samples(iteration)), iteration)
        except WaitingError as error:
            missing = str(error)
    if loop.people is not None and (missing := loop.world.broadcast_object(missing)) is not None:
        raise WaitingError(missing)
    return said


def _with_people(
    loop: Loop, people: AskPeople, groups: Groups, iteration: int, said: Mapping[int, Said]
) -> Paired:
    """People's pairs, stored as the stage "label", and those of rewards for the prompts that people were not
    asked about."""
    agents = frozenset(sample.agent for group in groups for sample in group)
    paired = Paired(len(groups), agents)
    if len(said) < len(groups):
        scores, ranking = stack_rewards(groups), loop.ranking
        mixed = ranking.mix(scores)
        mixed[list(said)] = np.nan
        paired = make_pairs(
            groups,
            mixed,
            iteration=iteration,
            seed=loop.config.seed,
            judge=ranking.judge,
            min_margin=loop.config.pairing.min_margin,
            dominance=ranking.dominance(scores) if ranking.dominance else None,
        )
        paired.dropped_nan -= len(said)
    add_people(paired, people, groups, said, (loop.config.seed, iteration))
    store = loop.store
    if not store.is_complete("label", iteration):
        store.discard_incomplete("label", iteration)
        if not store.unit_done(iteration, 0, stage="label"):
            store.append_pairs(iteration, 0, paired.by_people, stage="label")
        store.write_manifest("label", iteration, paired.metrics())
    return paired


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
