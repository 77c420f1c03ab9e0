"""Cost in network evaluations, so that methods are compared at equal cost.

One evaluation is one forward of the denoiser on one latent. A backward counts as two (activation and weight gradients). What a
pair costs in Diffusion-DPO: policy forward on winner and loser 2, reference 2, policy backward 4: 8 evaluations. Scoring,
text encoding and decoding are not counted; their seconds are in the report.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo.config.schema import RunConfig
from diffexpo.diffusion.sampling import num_network_evaluations

BACKWARD = 2
PAIR_FORWARDS = 4
PAIR_BACKWARDS = 2
PAIR_COST = PAIR_FORWARDS + BACKWARD * PAIR_BACKWARDS


@dataclass(frozen=True)
class Cost:
    """Evaluations of a run by what they are spent on."""

    sampling: int
    training: int
    images: int
    pairs_trained: int
    optimizer_steps: int

    @property
    def total(self) -> int:
        return self.sampling + self.training


def run_cost(config: RunConfig) -> Cost:
    """Network evaluations of a whole run, from its configuration alone (evaluation not included).

    sampling = (T - 1) * N * 2B * evaluations per image
    training = T * steps * batch * 8  (+ contrast pairs * 8 from iteration 2 on when alpha > 0)
    """
    explore, training = config.explore, config.training
    trained = explore.iterations - (config.offline.source is None)
    images = (explore.iterations - 1) * explore.prompts_per_iteration * 2 * explore.images_per_prompt
    return Cost(
        sampling=sampling_cost(config, images),
        training=sum(training_cost(config, iteration) for iteration in range(1, explore.iterations + 1)),
        images=images,
        pairs_trained=trained * training.steps * training.batch_size,
        optimizer_steps=trained * training.steps,
    )


def sampling_cost(config: RunConfig, images: int) -> int:
    """Network evaluations of drawing so many images for training."""
    sampler = config.explore.sampler
    return images * num_network_evaluations(sampler, sampler.guidance != 1.0)


def training_cost(config: RunConfig, iteration: int) -> int:
    """Network evaluations of one iteration's updates; contrast pairs exist from iteration 2 on, when alpha > 0.

    Without offline pairs nothing is trained in iteration 1.
    """
    if iteration == 1 and config.offline.source is None:
        return 0
    training, algorithm = config.training, config.algorithm
    has_contrast = algorithm.type == "expo" and algorithm.alpha > 0 and iteration > 1
    contrast = contrast_pairs(training.batch_size, algorithm.contrast_fraction) if has_contrast else 0
    return training.steps * (training.batch_size + contrast) * PAIR_COST


def contrast_pairs(batch_size: int, fraction: float) -> int:
    """Contrast pairs beside `batch_size` preference pairs: at least one when the fraction is positive."""
    return max(1, round(batch_size * fraction)) if fraction > 0 else 0


def offline_steps_of_equal_cost(config: RunConfig) -> int:
    """Optimiser steps of Diffusion-DPO on D_off whose network evaluations equal the whole run's (rounded to nearest)."""
    return max(1, round(run_cost(config).total / (config.training.batch_size * PAIR_COST)))
