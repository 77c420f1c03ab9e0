"""What a run's method and settings mean for its size: rows of a network call, versions of the weights,
images.

Everything in this room that depends on the method is asked here.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffexpo.algorithms import ALGORITHMS
from diffexpo.config import RunConfig
from diffexpo.config.algorithms import (
    D3poConfig,
    ExpoConfig,
    ImprovementDpoConfig,
    PrdpConfig,
    SpoConfig,
    TrajectoryConfig,
)
from diffexpo.config.image_rules import ON_PAIRS
from diffexpo.config.rules import collects
from diffexpo.estimate.memory import TrainingShape
from diffexpo.types import Algorithm, Conditioning

EVALUATION_BATCH = 64


def method(config: RunConfig) -> Algorithm:
    """The method, to be asked what it needs; it is never run, so its empty prompt is empty."""
    return ALGORITHMS[config.algorithm.type](config.algorithm, Conditioning({}))


def has_improver(config: RunConfig) -> bool:
    """Whether an improvement model is trained beside the policy."""
    return isinstance(config.algorithm, ImprovementDpoConfig)


def keeps_trajectories(config: RunConfig) -> bool:
    """Whether the steps of every drawn image are kept until they are trained."""
    return isinstance(config.algorithm, TrajectoryConfig)


def could_learn_in_two_passes(config: RunConfig) -> bool:
    """Whether winners and losers are held together, and could be trained one after the other."""
    return isinstance(config.algorithm, ON_PAIRS) and config.training.pair_gradient == "joint"


def versions(config: RunConfig) -> list[str]:
    """Versions of the weights beside the frozen network: what `online` and `training` copy."""
    algorithm = method(config)
    names = ["current"] if config.tuning.kind == "lora" else ["current", "base"]
    if not keeps_trajectories(config):
        names.append("main")
    if algorithm.needs_reference and getattr(config.algorithm, "reference", "base") == "previous":
        names.append("reference")
    return [*names, "old"] if algorithm.needs_old_policy else names


def evaluation_batch(config: RunConfig) -> int:
    """Images of one network call while evaluating: no more than while collecting, which must fit in memory
    too."""
    return min(EVALUATION_BATCH, config.explore.batch_size)


def draws(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(images, rows of each) of a network call wherever images are drawn."""
    explore, evaluation = config.explore, config.evaluation
    yield evaluation_batch(config), 2 if evaluation.sampler.guidance != 1.0 else 1
    if has_improver(config):
        # Neither condition, the image alone, image and text.
        yield explore.batch_size, 3
    elif collects(config):
        yield explore.batch_size, 2 if explore.sampler.guidance != 1.0 else 1


def training_shape(config: RunConfig) -> TrainingShape:
    """Rows of one micro-batch, as the methods run them."""
    training, algorithm = config.training, config.algorithm
    has_reference = method(config).needs_reference
    rows = training.micro_batch_size
    if keeps_trajectories(config):
        rows *= 2 if config.explore.sampler.guidance != 1.0 else 1
        rows *= 2 if isinstance(algorithm, D3poConfig | SpoConfig | PrdpConfig) else 1
    elif isinstance(algorithm, ON_PAIRS):
        rows *= 2
        if training.pair_gradient == "two_pass":
            return TrainingShape(training.micro_batch_size, 0, rows)
        # The graph of the contrast pairs is held together with that of the preference pairs.
        if isinstance(algorithm, ExpoConfig) and algorithm.alpha > 0:
            rows += 2 * max(1, round(training.micro_batch_size * algorithm.contrast_fraction))
    return TrainingShape(rows, rows if has_reference else 0)
