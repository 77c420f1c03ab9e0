"""Cost in network evaluations, so that methods are compared at equal cost.

One evaluation is one forward of the denoiser on one latent. A backward counts as two (activation and weight
gradients). What a pair costs in Diffusion-DPO: policy forward on winner and loser 2, reference 2, policy
backward 4: 8 evaluations. Scoring, text encoding and decoding are not counted; their seconds are in the
report. Everything here follows from what the method's card declares.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo.config import RunConfig
from diffexpo.config.methods import MethodConfig, offline_baseline
from diffexpo.config.methods.data import Pairs, TransitionPairs, Transitions
from diffexpo.config.schema import TrainingConfig
from diffexpo.diffusion.sampling import num_network_evaluations
from diffexpo.training.selfcheck import CHECKED_ROWS

BACKWARD = 2
"""Evaluations that the backward of one forward counts as."""


@dataclass(frozen=True)
class Cost:
    """Evaluations of a run by what they are spent on."""

    sampling: int
    training: int
    checks: int
    images: int
    pairs_trained: int
    optimizer_steps: int

    @property
    def total(self) -> int:
        return self.sampling + self.training + self.checks

    @property
    def split(self) -> str:
        """The parts of the total in words."""
        parts = {"sampling": self.sampling, "training": self.training, "checking": self.checks}
        return ", ".join(f"{count:,} {name}" for name, count in parts.items() if count or name != "checking")


def run_cost(config: RunConfig) -> Cost:
    """Network evaluations of a whole run, from its configuration alone (evaluation not included).

    sampling = collections * prompts * images of a prompt * evaluations of an image
    training = iterations that train * steps * rows * evaluations of a row (`row_cost`)
    checks = what iterations look at before their first step (`check_cost`)

    T iterations collect and train where a method draws first what it learns from; else T - 1 collect, and the
    first trains only if there is something offline to learn from.
    """
    explore, training, algorithm = config.explore, config.training, config.algorithm
    collections = explore.iterations - (not algorithm.draws_first)
    images = collections * explore.prompts_per_iteration * algorithm.images_of_prompt(config)
    iterations = range(1, explore.iterations + 1)
    updates = [training_cost(config, iteration) for iteration in iterations]
    trained = sum(cost > 0 for cost in updates)
    extra = algorithm.stage_costs(config, images)
    return Cost(
        sampling=sampling_cost(config, images) + extra["drawing"],
        training=sum(updates) + extra["training"],
        checks=sum(check_cost(config, iteration) for iteration in iterations),
        images=images * algorithm.versions_drawn,
        pairs_trained=trained * training.steps * training.batch_size,
        optimizer_steps=trained * training.steps,
    )


def sampling_cost(config: RunConfig, images: int) -> int:
    """Network evaluations of drawing this many images for training."""
    sampler = config.explore.sampler
    evaluations = num_network_evaluations(sampler, sampler.guidance != 1.0)
    return images * config.algorithm.evaluations_per_image(sampler, evaluations)


def evaluation_cost(config: RunConfig) -> int:
    """Network evaluations of evaluating one version, without the KL's paths."""
    evaluation = config.evaluation
    extra = evaluation.vendi_prompts * max(evaluation.vendi_images - evaluation.images_per_prompt, 0)
    images = evaluation.num_prompts * evaluation.images_per_prompt + extra
    return images * num_network_evaluations(evaluation.sampler, evaluation.sampler.guidance != 1.0)


def training_cost(config: RunConfig, iteration: int) -> int:
    """Network evaluations of one iteration's updates; contrast pairs exist from iteration 2 on. Its start is
    checked on its first step, at no cost but `check_cost`.

    Where a method learns from earlier collections and has nothing offline, nothing is trained in iteration 1.
    """
    algorithm, training = config.algorithm, config.training
    if iteration < algorithm.first_trained(config):
        return 0
    contrast = _contrast_pairs(config, iteration)
    rows = (training.batch_size + contrast) * row_cost(config) - contrast * anchor_cost(algorithm)
    return training.steps * rows


def check_cost(config: RunConfig, iteration: int) -> int:
    """Network evaluations before an iteration's first step: where it starts apart from its reference, a few
    rows run under every version without gradient, with the policy as its own reference (with several image
    sizes possibly fewer rows)."""
    algorithm, training = config.algorithm, config.training
    is_checked = iteration == 1 if algorithm.draws_first else iteration >= algorithm.first_trained(config)
    if not (is_checked and algorithm.shows_agreement and algorithm.starts_apart(config, iteration)):
        return 0
    rows = min(CHECKED_ROWS, training.micro_batch_size, training.batch_size)
    contrast = rows * _contrast_pairs(config, iteration) // training.batch_size
    is_guided = config.explore.sampler.guidance != 1.0
    return (rows + contrast) * _pass_cost(algorithm, is_guided) + rows * anchor_cost(algorithm)


def _contrast_pairs(config: RunConfig, iteration: int) -> int:
    data = config.algorithm.data
    return data.contrast_pairs(config.training.batch_size) if isinstance(data, Pairs) and iteration > 1 else 0


def row_cost(config: RunConfig) -> int:
    """Network evaluations of training on one row of the run's batches."""
    return evaluations_of_row(config.algorithm, config.training, config.explore.sampler.guidance != 1.0)


def evaluations_of_row(algorithm: MethodConfig, training: TrainingConfig, is_guided: bool) -> int:
    """Network evaluations of training on one row: (1 + 2 with its backward + 1 for every other version of the
    weights + passes without gradient) for each image or transition of the row, at each of its draws of
    noise, and what its anchor takes.

    Args:
        algorithm: The method.
        training: `pair_gradient: two_pass` runs the policy once more.
        is_guided: Transitions are replayed with the guidance they were drawn with, on both of its sides.
    Returns:
        8 for Diffusion-DPO, 3 for supervised fine-tuning.
    """
    policy = BACKWARD + (isinstance(algorithm.data, Pairs) and training.pair_gradient == "two_pass")
    passes = _pass_cost(algorithm, is_guided) * (2 if algorithm.measures_batch else 1)
    return passes + policy * _images_of_row(algorithm, is_guided) + anchor_cost(algorithm)


def _pass_cost(algorithm: MethodConfig, is_guided: bool) -> int:
    """Network evaluations of a forward on one row under every version that the loss looks at."""
    return (1 + len(algorithm.versions)) * _images_of_row(algorithm, is_guided)


def _images_of_row(algorithm: MethodConfig, is_guided: bool) -> int:
    """Images or transitions of a row at each of its draws of noise; guidance gives a transition two sides."""
    data = algorithm.data
    sides = 2 if is_guided and isinstance(data, Transitions | TransitionPairs) else 1
    return sides * data.images_per_row * data.draws


def anchor_cost(algorithm: MethodConfig) -> int:
    """Network evaluations of the base's predictions that a row is held to; contrast pairs are not held."""
    return algorithm.anchor_forwards * algorithm.data.images_per_row * algorithm.held_draws


def offline_steps_of_equal_cost(config: RunConfig) -> int:
    """Optimiser steps of the offline baseline on D_off whose network evaluations equal the whole run's
    (rounded to nearest), checks aside on both sides."""
    baseline = offline_baseline(config.algorithm, starts_apart=config.tuning.start is not None)
    row = evaluations_of_row(baseline, config.training, is_guided=False)
    cost = run_cost(config)
    return max(1, round((cost.sampling + cost.training) / (config.training.batch_size * row)))
