"""What gives an iteration's batches, by the kind of data that the method learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch

from diffexpo.config.methods.data import Images, Pairs, PlainReward, TransitionPairs, Transitions
from diffexpo.config.schema import SamplerConfig
from diffexpo.data.latents import latent_shapes
from diffexpo.data.pairs import PairLoader, pair_index
from diffexpo.data.rows import Sample
from diffexpo.data.scored import ScoredLoader, ScoredSource, Weigh
from diffexpo.data.trajectories import (
    Place,
    TransitionLoader,
    TransitionPairLoader,
    TransitionPairRef,
    TransitionRef,
    read_branch,
    read_two_trajectories,
)
from diffexpo.diffusion.transitions import stochastic_grid
from diffexpo.online.advantages import group_advantages
from diffexpo.online.baseline import baseline_advantages
from diffexpo.online.credit import image_advantages, scored_images
from diffexpo.online.loop import Loop
from diffexpo.online.trajectories import chosen_steps, iteration_sampler, trajectories_of
from diffexpo.online.units import group_rows, texts_of_row
from diffexpo.types import Algorithm, WeighsImages


class Batches(NamedTuple):
    """Batches of an iteration, and metrics of making them."""

    loader: PairLoader | ScoredLoader | TransitionLoader | TransitionPairLoader
    metrics: dict[str, float]


def batches_of(loop: Loop, iteration: int) -> Batches:
    """The batches that an iteration trains on."""
    data = loop.config.algorithm.data
    return LOADERS[type(data)](loop, iteration, data)


def sizes_of_images(loop: Loop) -> dict[str, tuple[int, int]]:
    """Size of each stored sample's image by its id; empty where all images have one size."""
    return loop.store.sizes() if len(latent_shapes(loop.policy)) > 1 else {}


# ---- images and pairs of them ------------------------------------------------------------------------------


def _pairs(loop: Loop, iteration: int, data: Pairs) -> Batches:
    batch_size = loop.config.training.batch_size
    return Batches(pair_loader(loop, iteration, iteration, batch_size, data.contrast_pairs(batch_size)), {})


def pair_loader(loop: Loop, iteration: int, until: int, batch_size: int, contrast: int = 0) -> PairLoader:
    """Batches of the pairs that iteration `until` learns from."""
    index = pair_index(loop.store, loop.config.hybrid, until)
    loop.embeddings.add(["", *index.prompts()])
    return PairLoader(
        loop.store,
        index,
        loop.embeddings,
        batch_size=batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        contrast_per_batch=contrast,
        sizes=sizes_of_images(loop),
    )


def _images(loop: Loop, iteration: int, data: Images) -> Batches:
    config, sizes = loop.config, sizes_of_images(loop)
    index = ScoredSource(
        loop.store,
        config.hybrid,
        loop.ranking.mix if config.algorithm.is_ranked else None,
        partial(group_advantages, global_std=data.global_std),
        keep=data.keep,
        desirable_fraction=data.desirable_fraction,
        weigh=_weigher(loop.engine.algorithm),
        weigh_scope=data.weigh_scope,
        sizes=sizes,
    ).index(iteration)
    loop.embeddings.add(["", *index.prompts()])
    loader = ScoredLoader(
        loop.store,
        index,
        loop.embeddings,
        batch_size=config.training.batch_size,
        run_seed=config.seed,
        iteration=iteration,
        whole_groups=data.whole_groups,
        sizes=sizes,
    )
    return Batches(loader, {})


def _weigher(algorithm: Algorithm) -> Weigh | None:
    if not isinstance(algorithm, WeighsImages):
        return None
    return lambda rewards: algorithm.weigh(torch.from_numpy(rewards)).numpy()


# ---- transitions -------------------------------------------------------------------------------------------


def _transitions(loop: Loop, iteration: int, data: Transitions) -> Batches:
    """Transitions with the advantage of their image, or with its reward less a learned value; images without
    a score, or with an advantage of exactly 0, are left out."""
    sampler, trajectories = iteration_sampler(loop, iteration), trajectories_of(loop, iteration)
    kind = data.advantage
    metrics: dict[str, float] = {}
    if isinstance(kind, PlainReward):
        scored = scored_images(loop, iteration)
    else:
        scored = [image for image in image_advantages(loop, iteration, kind) if image[1] != 0]
    refs = [
        TransitionRef(sample.sample_id, _place(sample), index, advantage, *texts_of_row(sample))
        for sample, advantage in scored
        if np.isfinite(advantage)
        for index in chosen_steps(loop, sampler, sample.sample_id)
    ]
    if isinstance(kind, PlainReward) and kind.baseline is not None and refs:
        grid = stochastic_grid(loop.policy.path, sampler)
        refs, metrics = baseline_advantages(loop, iteration, trajectories, refs, grid, kind.baseline)
    loader = TransitionLoader(
        trajectories,
        refs,
        loop.embeddings,
        sampler,
        batch_size=loop.config.training.batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        needs_means=data.needs_means,
    )
    return Batches(loader, metrics)


def _transition_pairs(loop: Loop, iteration: int, data: TransitionPairs) -> Batches:
    sampler, is_branched = iteration_sampler(loop, iteration), data.source == "branches"
    if is_branched:
        refs = _branches(loop, iteration, sampler)
    else:
        refs = _refs_of_couples(loop, iteration, sampler, COUPLES[data.source](loop, iteration))
    loader = TransitionPairLoader(
        trajectories_of(loop, iteration),
        refs,
        loop.embeddings,
        sampler,
        batch_size=loop.config.training.batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        whole_pairs=data.whole_pairs,
        read=read_branch if is_branched else read_two_trajectories,
    )
    return Batches(loader, {})


Couple = tuple[str, Sample, Sample]


def _decided_couples(loop: Loop, iteration: int) -> list[Couple]:
    """The pairs of the pair stage."""
    samples = {sample.sample_id: sample for sample in loop.store.samples(iteration)}
    return [
        (pair.pair_id, samples[pair.winner_id], samples[pair.loser_id])
        for pair in loop.store.pairs(iteration)
    ]


def _every_couple(loop: Loop, iteration: int) -> list[Couple]:
    """Every two scored images of a prompt."""
    usable = [sample for sample, reward in scored_images(loop, iteration) if np.isfinite(reward)]
    return [
        (f"{first.sample_id}+{second.sample_id}", first, second)
        for group in group_rows(usable)
        for first, second in combinations(group, 2)
    ]


COUPLES = {"decided": _decided_couples, "every": _every_couple}


def _refs_of_couples(
    loop: Loop, iteration: int, sampler: SamplerConfig, couples: Sequence[Couple]
) -> list[TransitionPairRef]:
    """The trained steps of two trajectories each, with the rewards of their images."""
    rewards = {sample.sample_id: reward for sample, reward in scored_images(loop, iteration)}
    return [
        TransitionPairRef(
            pair_id,
            index,
            _place(winner),
            _place(loser),
            rewards[winner.sample_id],
            rewards[loser.sample_id],
            *texts_of_row(winner),
        )
        for pair_id, winner, loser in couples
        for index in chosen_steps(loop, sampler, pair_id)
    ]


def _branches(loop: Loop, iteration: int, sampler: SamplerConfig) -> list[TransitionPairRef]:
    """Best and worst candidate of each branched step that decided."""
    trajectories = trajectories_of(loop, iteration)
    by_unit: dict[int, dict[int, Sample]] = {}
    for sample in loop.store.samples(iteration):
        by_unit.setdefault(sample.unit, {})[sample.place[1]] = sample
    refs = []
    for unit, samples in sorted(by_unit.items()):
        index, position, scores = (
            trajectories.part(unit, f"branch_{name}").tolist() for name in ("index", "row", "scores")
        )
        for number, (step, place, (best, worst)) in enumerate(zip(index, position, scores, strict=True)):
            sample, here = samples[place], Place(unit, number)
            if step in chosen_steps(loop, sampler, sample.sample_id):
                name = f"{sample.sample_id}:{step}"
                refs.append(TransitionPairRef(name, step, here, here, best, worst, *texts_of_row(sample)))
    return refs


def _place(sample: Sample) -> Place:
    return Place(sample.unit, sample.place[1])


LOADERS: dict[type, Callable[[Loop, int, Any], Batches]] = {
    Pairs: _pairs,
    Images: _images,
    Transitions: _transitions,
    TransitionPairs: _transition_pairs,
}
