"""The one table of settings that take less memory: the estimate asks it for what would make a run fit, the
message of an allocation that failed for what helps in that phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from diffexpo.config import RunConfig
from diffexpo.config.rules import AUTOCAST_TYPES
from diffexpo.estimate.method import could_learn_in_two_passes

WITHOUT_COPIES = {"reference_dtype": "float32", "reference_device": "same"}
LOADING = ("loading scorers", "loading the model")
DRAWING = ("drawing images", "decoding images")
# A failed allocation that passed through no phase could have been in any of these.
UNKNOWN = ("training", "decoding images", *LOADING[:1])
WEIGHTS = ("training", *DRAWING, "encoding prompts", *LOADING)


@dataclass(frozen=True)
class Change:
    """Settings that make a run smaller, and what they cost."""

    settings: tuple[str, ...]
    price: str


Steps = Callable[[RunConfig], Iterator[Change]]


@dataclass(frozen=True)
class Saving:
    """A row of the table.

    Args:
        steps: The changes of a run, each smaller than the one before; none where there is nothing to save.
        phases: Where it helps; empty for the estimate alone.
        is_counted: The estimate sees the difference, and advises it.
        helps_cpu: It also saves where the device's memory is main memory.
    """

    steps: Steps
    phases: tuple[str, ...]
    is_counted: bool = True
    helps_cpu: bool = True


def counted_savings(config: RunConfig) -> Iterator[Change]:
    """What lowers the estimate's peak, each on top of the ones before, in order of what they cost."""
    return (change for row in SAVINGS if row.is_counted for change in row.steps(config))


def savings_in(phase: str | None, config: RunConfig) -> list[Change]:
    """What takes less in a phase of `phases.PHASES` (None: not known), in order of what it costs."""
    wanted = set(UNKNOWN if phase is None else (phase,))
    rows = [row for row in SAVINGS if wanted & {*row.phases}]
    if is_on_cpu(config):
        rows = [row for row in rows if row.helps_cpu]
    return list(dict.fromkeys(change for row in rows for change in row.steps(config)))


def is_on_cpu(config: RunConfig) -> bool:
    """Whether a run's device is the CPU."""
    is_automatic = config.model.device == "auto"
    return not torch.accelerator.is_available() if is_automatic else config.model.device == "cpu"


# ---- steps -------------------------------------------------------------------------------------------------


def _always(key: str, value: str, price: str) -> Steps:
    """Set `group.key` unless it has the value."""
    group, name = key.split(".")

    def steps(config: RunConfig) -> Iterator[Change]:
        if str(getattr(getattr(config, group), name)).lower() != value:
            yield Change((f"{key}={value}",), price)

    return steps


def _batches(sizes: tuple[int, ...], price: str) -> Steps:
    """Fewer images in a network call: the first of the sizes that is smaller."""

    def steps(config: RunConfig) -> Iterator[Change]:
        smaller = [size for size in sizes if size < config.explore.batch_size]
        yield from (Change((f"explore.batch_size={size}",), price) for size in smaller)

    return steps


def _first(steps: Steps) -> Steps:
    """The first step alone."""

    def first(config: RunConfig) -> Iterator[Change]:
        yield from list(steps(config))[:1]

    return first


def _half_batch(config: RunConfig) -> Iterator[Change]:
    if config.explore.batch_size > 1:
        price = "slower drawing; pictures are rounded by their batch"
        yield Change((f"explore.batch_size={config.explore.batch_size // 2}",), price)


def _micro_batches(config: RunConfig) -> Iterator[Change]:
    training = config.training
    for size in range(training.micro_batch_size - 1, 0, -1):
        if training.batch_size % size == 0:
            yield Change((f"training.micro_batch_size={size}",), "same result up to rounding, slower")


def _half_micro_batch(config: RunConfig) -> Iterator[Change]:
    half = config.training.micro_batch_size // 2
    fitting = [size for size in range(1, half + 1) if config.training.batch_size % size == 0]
    if fitting:
        yield Change((f"training.micro_batch_size={fitting[-1]}",), "same result up to rounding, slower")


def _two_passes(config: RunConfig) -> Iterator[Change]:
    if could_learn_in_two_passes(config):
        price = "same result up to rounding, one more forward pass"
        yield Change(("training.pair_gradient=two_pass",), price)


def _scorers(config: RunConfig) -> Iterator[Change]:
    for label, scorers in (("rewards", config.rewards), ("evaluation.judges", config.evaluation.judges)):
        for index, scorer in enumerate(scorers):
            if scorer.precision == "float32" and scorer.has_weights:
                price = f"scores of {scorer.name} move a little"
                yield Change((f"{label}.{index}.precision=float16",), price)


def _half_reference(config: RunConfig) -> Iterator[Change]:
    tuning, autocast = config.tuning, config.training.mixed_precision
    if tuning.kind == "lora" or tuning.reference_dtype != "float32" or not config.algorithm.needs_reference:
        return
    if autocast == "no":
        settings = ("training.mixed_precision=bf16", "tuning.reference_dtype=bfloat16")
        yield Change(settings, "rounding; faster")
    else:
        yield Change((f"tuning.reference_dtype={AUTOCAST_TYPES[autocast]}",), "same result")


def _parked_copies(config: RunConfig) -> Iterator[Change]:
    if config.tuning.kind == "full" and config.tuning.reference_device == "same":
        price = "same result; moves the denoiser for each pass of the reference"
        yield Change(("tuning.reference_device=cpu",), price)


def _autocast(kind: str) -> Steps:
    def steps(config: RunConfig) -> Iterator[Change]:
        if config.training.mixed_precision == "no" and config.tuning.kind == kind:
            yield Change(("training.mixed_precision=bf16",), "rounding; faster")

    return steps


def _half_weights(config: RunConfig) -> Iterator[Change]:
    """Adapters on a frozen base in half precision, whatever is trained today."""
    if config.tuning.kind == "full":
        lora = ("tuning.kind=lora", "model.dtype=bfloat16", "training.mixed_precision=bf16")
        own = (
            f"tuning.{name}={value}"
            for name, value in WITHOUT_COPIES.items()
            if getattr(config.tuning, name) != value
        )
        price = "trains adapters on a half-precision base; takes a larger learning rate"
        yield Change((*lora, *own), price)
    elif config.model.dtype == "float32":
        yield Change(("model.dtype=bfloat16",), "the frozen networks in half precision")


_TILES = "pictures above the autoencoder's own size change a little"
SAVINGS = (
    Saving(
        _always("model.vae_slicing", "true", "same result up to rounding"),
        ("decoding images", "encoding images"),
    ),
    Saving(
        _always("explore.overlap_scoring", "false", "same result, slower where scoring takes long"),
        (*DRAWING, "scoring images"),
        is_counted=False,
    ),
    Saving(_first(_batches((16, 8, 4), "slower drawing")), ()),
    Saving(
        _always("training.gradient_checkpointing", "true", "same result, a third more compute in training"),
        ("training",),
    ),
    Saving(_micro_batches, ()),
    Saving(_half_micro_batch, ("training",), is_counted=False),
    Saving(_two_passes, ("training",)),
    Saving(_batches((4, 1), "much slower drawing"), ()),
    Saving(_half_batch, (*DRAWING, "scoring images"), is_counted=False),
    Saving(_always("explore.merge_lora", "false", "rounding; slower drawing"), DRAWING, is_counted=False),
    Saving(_scorers, ("scoring images", *LOADING)),
    Saving(_half_reference, (*WEIGHTS, "scoring images"), helps_cpu=False),
    Saving(_parked_copies, (*WEIGHTS, "scoring images"), helps_cpu=False),
    Saving(_autocast("lora"), ("training",)),
    Saving(_autocast("full"), ("training",), is_counted=False),
    Saving(_half_weights, WEIGHTS),
    Saving(_always("model.vae_tiling", "true", _TILES), ("decoding images", "encoding images")),
    Saving(
        _always("model.drop_t5", "true", "Stable Diffusion 3 only: text is understood less well"),
        ("encoding prompts", *LOADING),
    ),
)
"""In order of what they cost."""
