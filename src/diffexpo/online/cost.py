"""Cost in network evaluations, so that methods are compared at equal cost.

One evaluation is one forward of the denoiser on one latent. A backward counts as two (activation and weight
gradients). What a pair costs in Diffusion-DPO: policy forward on winner and loser 2, reference 2, policy
backward 4: 8 evaluations. Scoring, text encoding and decoding are not counted; their seconds are in the
report.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo.config.algorithms import (
    AwmConfig,
    D3poConfig,
    DgpoConfig,
    DiffusionDpoConfig,
    DiffusionKtoConfig,
    DiffusionNftConfig,
    DpokConfig,
    FlowGrpoConfig,
    ImprovementDpoConfig,
    MapoConfig,
    PrdpConfig,
    RwrConfig,
    SftConfig,
    SpoConfig,
    TrajectoryConfig,
)
from diffexpo.config.image_rules import ON_PAIRS, learns_from_offline
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

    for Diffusion-DPO and EXPO; `row_cost` has the other methods' number in place of 8. T - 1 iterations train
    where the first has nothing to learn from.

    Methods on trajectories draw n images for each prompt in each of the T iterations, see
    `transition_training_cost`.
    """
    explore, training = config.explore, config.training
    if isinstance(config.algorithm, TrajectoryConfig):
        return _rollout_cost(config)
    trained = explore.iterations - (not learns_from_offline(config))
    images = (explore.iterations - 1) * explore.prompts_per_iteration * 2 * explore.images_per_prompt
    updates = sum(training_cost(config, iteration) for iteration in range(1, explore.iterations + 1))
    return Cost(
        sampling=sampling_cost(config, images) + improving_cost(config, images),
        training=updates + improver_training_cost(config),
        images=images * (2 if isinstance(config.algorithm, ImprovementDpoConfig) else 1),
        pairs_trained=trained * training.steps * training.batch_size,
        optimizer_steps=trained * training.steps,
    )


def sampling_cost(config: RunConfig, images: int) -> int:
    """Network evaluations of drawing so many images for training; SPO without a step-aware judge evaluates
    each candidate of a branched step."""
    sampler, algorithm = config.explore.sampler, config.algorithm
    evaluations = num_network_evaluations(sampler, sampler.guidance != 1.0)
    if isinstance(algorithm, SpoConfig) and algorithm.judge is None:
        branched = max(0, sampler.steps - 1 - algorithm.first_transition)
        evaluations += evaluations // sampler.steps * branched * (algorithm.num_candidates - 1)
    return images * evaluations


def improving_cost(config: RunConfig, images: int) -> int:
    """Network evaluations of improving so many images: three predictions a step, one where double guidance is
    off."""
    algorithm = config.algorithm
    if not isinstance(algorithm, ImprovementDpoConfig):
        return 0
    improver = algorithm.improver
    is_single = (improver.image_scale, improver.text_scale) in ((1.0, 1.0), (1.0, 0.0))
    return images * (improver.sampler_steps or config.explore.sampler.steps) * (1 if is_single else 3)


def improver_training_cost(config: RunConfig) -> int:
    """Network evaluations of training the improvement model: one forward and its backward on each pair; none
    where one is given."""
    algorithm = config.algorithm
    if not isinstance(algorithm, ImprovementDpoConfig) or algorithm.improver.path is not None:
        return 0
    return algorithm.improver.steps * algorithm.improver.batch_size * (1 + BACKWARD)


def training_cost(config: RunConfig, iteration: int) -> int:
    """Network evaluations of one iteration's updates; contrast pairs exist from iteration 2 on, when alpha >
    0.

    Without offline pairs nothing is trained in iteration 1.
    """
    if iteration == 1 and not learns_from_offline(config):
        return 0
    training, algorithm = config.training, config.algorithm
    has_contrast = algorithm.type == "expo" and algorithm.alpha > 0 and iteration > 1
    contrast = contrast_pairs(training.batch_size, algorithm.contrast_fraction) if has_contrast else 0
    return training.steps * (training.batch_size + contrast) * row_cost(config)


def row_cost(config: RunConfig) -> int:
    """Network evaluations of training on one row, a pair or an image.

    (1 + 2 with its backward + 1 for each other version of the weights + passes without gradient) * 2 for
    pairs
    """
    algorithm, is_two_pass = config.algorithm, config.training.pair_gradient == "two_pass"
    is_pair = isinstance(algorithm, ON_PAIRS)
    forwards = 1 + BACKWARD + _other_versions(config) + (is_pair and is_two_pass)
    if isinstance(algorithm, DiffusionKtoConfig):
        forwards += 2
    if isinstance(algorithm, DiffusionDpoConfig) and algorithm.auto_beta:
        forwards += 2
    return forwards * (2 if is_pair else 1)


def _other_versions(config: RunConfig) -> int:
    """How many versions of the weights beside the current one look at each image: reference and old
    policy."""
    algorithm = config.algorithm
    if isinstance(algorithm, DiffusionNftConfig | AwmConfig):
        return 1 + (algorithm.kl_weight > 0)
    if isinstance(algorithm, DgpoConfig):
        return 1 + (algorithm.clip_range is not None)
    if isinstance(algorithm, MapoConfig | SftConfig | RwrConfig):
        return 0
    is_free = isinstance(algorithm, DiffusionDpoConfig) and algorithm.kind == "simpo"
    return 0 if is_free else 1


def transition_training_cost(config: RunConfig) -> int:
    """Network evaluations of one iteration's updates on transitions.

    steps * batch * g * (3 + 1 if there is a reference) [* 2 for pairs of transitions],   g = 2 with guidance,
    else 1
    """
    training, algorithm = config.training, config.algorithm
    kl_weight = algorithm.kl_weight if isinstance(algorithm, DpokConfig | FlowGrpoConfig) else 0.0
    is_pair = isinstance(algorithm, D3poConfig | SpoConfig | PrdpConfig)
    forwards = 1 + BACKWARD + (is_pair or kl_weight > 0)
    guided = 2 if config.explore.sampler.guidance != 1.0 else 1
    return training.steps * training.batch_size * guided * forwards * (2 if is_pair else 1)


def _rollout_cost(config: RunConfig) -> Cost:
    explore, training = config.explore, config.training
    images = explore.iterations * explore.prompts_per_iteration * explore.images_per_prompt
    steps = explore.iterations * training.steps
    return Cost(
        sampling=sampling_cost(config, images),
        training=explore.iterations * transition_training_cost(config),
        images=images,
        pairs_trained=steps * training.batch_size,
        optimizer_steps=steps,
    )


def contrast_pairs(batch_size: int, fraction: float) -> int:
    """Contrast pairs beside `batch_size` preference pairs: at least one when the fraction is positive."""
    return max(1, round(batch_size * fraction)) if fraction > 0 else 0


def offline_steps_of_equal_cost(config: RunConfig) -> int:
    """Optimiser steps of Diffusion-DPO on D_off whose network evaluations equal the whole run's (rounded to
    nearest)."""
    pair_cost = PAIR_COST + (2 if config.training.pair_gradient == "two_pass" else 0)
    return max(1, round(run_cost(config).total / (config.training.batch_size * pair_cost)))
