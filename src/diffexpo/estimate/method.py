"""What a run's method and settings mean for its size: rows of a network call, versions of the weights,
images.

Everything in this room that depends on the method is asked here, and answered by its card.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffexpo.config import RunConfig
from diffexpo.config.methods.data import Pairs, TransitionPairs, Transitions
from diffexpo.estimate.memory import TrainingShape

EVALUATION_BATCH = 64


def could_learn_in_two_passes(config: RunConfig) -> bool:
    """Whether winners and losers are held together, and could be trained one after the other."""
    return isinstance(config.algorithm.data, Pairs) and config.training.pair_gradient == "joint"


def versions(config: RunConfig) -> list[str]:
    """Versions of the weights besides the frozen network: what `online` and `training` copy."""
    card = config.algorithm
    names = ["current"] if config.tuning.kind == "lora" else ["current", "base"]
    if not card.draws_first:
        names.append("main")
    if card.needs_reference and card.moves_reference:
        names.append("reference")
    return [*names, "old"] if card.needs_old_policy else names


def evaluation_batch(config: RunConfig) -> int:
    """Images of one network call while evaluating: no more than while collecting, which must fit in memory
    too."""
    return min(EVALUATION_BATCH, config.explore.batch_size)


def draws(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(images, rows of each) of a network call wherever images are drawn."""
    explore, evaluation = config.explore, config.evaluation
    yield evaluation_batch(config), 2 if evaluation.sampler.guidance != 1.0 else 1
    if config.algorithm.improvement is not None:
        # Neither condition, the image alone, image and text.
        yield explore.batch_size, 3
    elif config.algorithm.collects(config):
        yield explore.batch_size, 2 if explore.sampler.guidance != 1.0 else 1


def training_shape(config: RunConfig) -> TrainingShape:
    """Rows of one micro-batch, as the methods run them."""
    training, data = config.training, config.algorithm.data
    rows = training.micro_batch_size * data.images_per_row * data.draws
    if isinstance(data, Transitions | TransitionPairs):
        rows *= 2 if config.explore.sampler.guidance != 1.0 else 1
    elif isinstance(data, Pairs):
        if training.pair_gradient == "two_pass":
            return TrainingShape(rows // 2, 0, rows)
        # The graph of the contrast pairs is held together with that of the preference pairs.
        rows += 2 * data.draws * data.contrast_pairs(training.micro_batch_size)
    card = config.algorithm
    return TrainingShape(rows, rows if card.needs_reference or card.anchor_forwards else 0)
