"""What gives an iteration's batches, by the kind of data that the method learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
)
from diffexpo.diffusion.transitions import stochastic_grid
from diffexpo.online.advantages import group_advantages
from diffexpo.online.baseline import baseline_advantages
from diffexpo.online.credit import image_advantages, mixed_rewards
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
    return LOADERS[type(loop.config.algorithm.data)](loop, iteration)


def sizes_of_images(loop: Loop) -> dict[str, tuple[int, int]]:
    """Size of each stored sample's image by its id; empty where all images have one size."""
    return loop.store.sizes() if len(latent_shapes(loop.policy)) > 1 else {}


# ---- images and pairs of them ------------------------------------------------------------------------------


def _pairs(loop: Loop, iteration: int) -> Batches:
    config, data = loop.config, loop.config.algorithm.data
    assert isinstance(data, Pairs)
    refs = pair_index(loop.store, config.hybrid, iteration)
    loop.embeddings.add(["", *refs.prompts()])
    loader = PairLoader(
        loop.store,
        refs,
        loop.embeddings,
        batch_size=config.training.batch_size,
        run_seed=config.seed,
        iteration=iteration,
        contrast_per_batch=data.contrast_pairs(config.training.batch_size),
        sizes=sizes_of_images(loop),
    )
    return Batches(loader, {})


def _images(loop: Loop, iteration: int) -> Batches:
    config, data, sizes = loop.config, loop.config.algorithm.data, sizes_of_images(loop)
    assert isinstance(data, Images)
    source = ScoredSource(
        loop.store,
        config.hybrid,
        loop.ranking.mix,
        lambda rewards, groups: group_advantages(rewards, groups, global_std=data.global_std),
        keep=data.keep,
        desirable_fraction=data.desirable_fraction,
        weigh=_weigher(loop.engine.algorithm),
        weigh_scope=data.weigh_scope,
        sizes=sizes,
    )
    index = source.index(iteration)
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


def _transitions(loop: Loop, iteration: int) -> Batches:
    """Transitions with the advantage of their image, or with its reward less a learned value; images without
    a score, or with an advantage of exactly 0, are left out."""
    data, sampler = loop.config.algorithm.data, iteration_sampler(loop, iteration)
    assert isinstance(data, Transitions)
    metrics: dict[str, float] = {}
    trajectories = trajectories_of(loop, iteration)
    if isinstance(data.advantage, PlainReward):
        groups = group_rows(loop.store.samples(iteration))
        rewards = mixed_rewards(loop, groups).ravel().tolist()
        scored = list(zip((one for group in groups for one in group), rewards, strict=True))
    else:
        scored = [pair for pair in image_advantages(loop, iteration, data.advantage) if pair[1] != 0]
    refs = [
        ref
        for sample, advantage in scored
        if np.isfinite(advantage)
        for ref in _refs_of(loop, sampler, sample, advantage)
    ]
    if isinstance(data.advantage, PlainReward) and data.advantage.baseline is not None and refs:
        grid = stochastic_grid(loop.policy.path, sampler)
        refs, metrics = baseline_advantages(
            loop, iteration, trajectories, refs, grid, data.advantage.baseline
        )
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


def _refs_of(loop: Loop, sampler: SamplerConfig, sample: Sample, advantage: float) -> list[TransitionRef]:
    text, negative = texts_of_row(sample)
    name, place = sample.sample_id, _place(sample)
    return [
        TransitionRef(name, place, index, advantage, text, negative)
        for index in chosen_steps(loop, sampler, name)
    ]


def _transition_pairs(loop: Loop, iteration: int) -> Batches:
    data = loop.config.algorithm.data
    assert isinstance(data, TransitionPairs)
    sampler = iteration_sampler(loop, iteration)
    is_branched = data.source == "branches"
    refs = (
        _branches(loop, iteration, sampler)
        if is_branched
        else _refs_of_couples(loop, iteration, sampler, COUPLES[data.source](loop, iteration))
    )
    loader = TransitionPairLoader(
        trajectories_of(loop, iteration),
        refs,
        loop.embeddings,
        sampler,
        batch_size=loop.config.training.batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        whole_pairs=data.whole_pairs,
        **({"read": read_branch} if is_branched else {}),
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
    groups = group_rows(loop.store.samples(iteration))
    couples = []
    for group, rewards in zip(groups, mixed_rewards(loop, groups), strict=True):
        usable = [sample for sample, reward in zip(group, rewards, strict=True) if np.isfinite(reward)]
        couples += [
            (f"{first.sample_id}+{second.sample_id}", first, second)
            for number, first in enumerate(usable)
            for second in usable[number + 1 :]
        ]
    return couples


COUPLES = {"decided": _decided_couples, "every": _every_couple}


def _refs_of_couples(
    loop: Loop, iteration: int, sampler: SamplerConfig, couples: Sequence[Couple]
) -> list[TransitionPairRef]:
    """The trained steps of two trajectories each, with the rewards of their images."""
    groups = group_rows(loop.store.samples(iteration))
    rewards = {
        sample.sample_id: float(value)
        for group, values in zip(groups, mixed_rewards(loop, groups), strict=True)
        for sample, value in zip(group, values, strict=True)
    }
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


LOADERS: dict[type, Callable[[Loop, int], Batches]] = {
    Pairs: _pairs,
    Images: _images,
    Transitions: _transitions,
    TransitionPairs: _transition_pairs,
}
