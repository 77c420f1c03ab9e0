"""The one table of settings that take less memory: the estimate asks it for what would make a run fit, the
message of an allocation that failed for what helps in that phase."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
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


Steps = Callable[[RunConfig], Iterable[Change]]


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
    device, has_accelerator = config.model.device, torch.accelerator.is_available()
    is_on_cpu = device == "cpu" or (device == "auto" and not has_accelerator)
    rows = [row for row in SAVINGS if wanted & {*row.phases} and (row.helps_cpu or not is_on_cpu)]
    return list(dict.fromkeys(change for row in rows for change in row.steps(config)))


# ---- steps -------------------------------------------------------------------------------------------------


def _if(applies: Callable[[RunConfig], bool], setting: str, price: str) -> Steps:
    """One setting, where it applies."""
    return lambda config: [Change((setting,), price)] if applies(config) else []


def _always(setting: str, price: str) -> Steps:
    """One setting `group.name=value`, unless it has the value."""
    group, name, value = re.split("[.=]", setting)
    return _if(lambda config: str(getattr(getattr(config, group), name)).lower() != value, setting, price)


def _autocast(kind: str) -> Steps:
    def applies(config: RunConfig) -> bool:
        return config.training.mixed_precision == "no" and config.tuning.kind == kind

    return _if(applies, "training.mixed_precision=bf16", "rounding; faster")


def _smaller(setting: str, sizes: Callable[[RunConfig], Iterable[int]], price: str) -> Steps:
    """A setting with each of the sizes in turn."""
    return lambda config: (Change((f"{setting}={size}",), price) for size in sizes(config))


def _batches(*sizes: int, steps: int | None = None) -> Callable[[RunConfig], list[int]]:
    """Those of the sizes that mean fewer images in a network call than now, the first few of them."""
    return lambda config: [size for size in sizes if size < config.explore.batch_size][:steps]


def _half_batch(config: RunConfig) -> list[int]:
    return [config.explore.batch_size // 2] if config.explore.batch_size > 1 else []


def _micro_batches(config: RunConfig) -> list[int]:
    """Sizes of a micro-batch below today's that divide the batch, largest first."""
    training = config.training
    return [size for size in range(training.micro_batch_size - 1, 0, -1) if training.batch_size % size == 0]


def _half_micro_batch(config: RunConfig) -> list[int]:
    return [size for size in _micro_batches(config) if size <= config.training.micro_batch_size // 2][:1]


def _scorers(config: RunConfig) -> Iterator[Change]:
    for label, scorers in config.scorers.items():
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


def _half_weights(config: RunConfig) -> Iterator[Change]:
    """Adapters on a frozen base in half precision, whatever is trained today."""
    if config.tuning.kind == "full":
        lora = ("tuning.kind=lora", "model.dtype=bfloat16", "training.mixed_precision=bf16")
        plain = WITHOUT_COPIES.items()
        own = (f"tuning.{name}={value}" for name, value in plain if getattr(config.tuning, name) != value)
        price = "trains adapters on a half-precision base; takes a larger learning rate"
        yield Change((*lora, *own), price)
    elif config.model.dtype == "float32":
        yield Change(("model.dtype=bfloat16",), "the frozen networks in half precision")


_IMAGES = ("decoding images", "encoding images")
_BATCH = "explore.batch_size"
_MICRO_BATCH, _ROUNDING = "training.micro_batch_size", "same result up to rounding, slower"
SAVINGS = (
    Saving(_always("model.vae_slicing=true", "same result up to rounding"), _IMAGES),
    Saving(
        _always("explore.overlap_scoring=false", "same result, slower where scoring takes long"),
        (*DRAWING, "scoring images"),
        is_counted=False,
    ),
    Saving(_smaller(_BATCH, _batches(16, 8, 4, steps=1), "slower drawing"), ()),
    Saving(
        _always("training.gradient_checkpointing=true", "same result, a third more compute in training"),
        ("training",),
    ),
    Saving(_smaller(_MICRO_BATCH, _micro_batches, _ROUNDING), ()),
    Saving(_smaller(_MICRO_BATCH, _half_micro_batch, _ROUNDING), ("training",), is_counted=False),
    Saving(
        _if(
            could_learn_in_two_passes,
            "training.pair_gradient=two_pass",
            "same result up to rounding, one more forward pass",
        ),
        ("training",),
    ),
    Saving(_smaller(_BATCH, _batches(4, 1), "much slower drawing"), ()),
    Saving(
        _smaller(_BATCH, _half_batch, "slower drawing; images are rounded by their batch"),
        (*DRAWING, "scoring images"),
        is_counted=False,
    ),
    Saving(_always("explore.merge_lora=false", "rounding; slower drawing"), DRAWING, is_counted=False),
    Saving(_scorers, ("scoring images", *LOADING)),
    Saving(_half_reference, (*WEIGHTS, "scoring images"), helps_cpu=False),
    Saving(
        _if(
            lambda config: config.tuning.kind == "full" and config.tuning.reference_device == "same",
            "tuning.reference_device=cpu",
            "same result; moves the denoiser for each pass of the reference",
        ),
        (*WEIGHTS, "scoring images"),
        helps_cpu=False,
    ),
    Saving(_autocast("lora"), ("training",)),
    Saving(_autocast("full"), ("training",), is_counted=False),
    Saving(_half_weights, WEIGHTS),
    Saving(
        _always("model.vae_tiling=true", "images above the autoencoder's own size change a little"), _IMAGES
    ),
    Saving(
        _always("model.drop_t5=true", "Stable Diffusion 3 only: text is understood less well"),
        ("encoding prompts", *LOADING),
    ),
)
"""In order of what they cost."""
