"""What a run will take, from its configuration alone: memory, disk, network evaluations. No weight is
read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, ClassVar

from diffexpo.bounded.yaml_texts import parse_yaml
from diffexpo.config import RunConfig
from diffexpo.errors import ConfigError
from diffexpo.estimate.advice import WITHOUT_COPIES, Change, counted_savings
from diffexpo.estimate.memory import CONTEXT, FLOAT32, Item, fits, largest_phase, peak_bytes
from diffexpo.estimate.method import draws, training_shape, versions
from diffexpo.estimate.networks import Sizes, activations, decoding, flops, scorer_bytes, sizes_of
from diffexpo.online.cost import Cost, run_cost
from diffexpo.policies.blueprint import merged_bytes

CARDS = (12, 24, 80)
# A PNG of a photograph is about half of its bytes, a row of the store's tables about 1 KiB.
PNG_SHARE, ROW = 0.5, 1024


@dataclass(frozen=True)
class Advice:
    """What makes a run fit on a card: settings in order of their price, and the total with all of them; None
    where nothing does."""

    gib: float
    changes: tuple[Change, ...] | None
    total: int


@dataclass(frozen=True)
class Estimate:
    """Memory and disk by item, and the cost in network evaluations."""

    source: str
    memory: tuple[Item, ...]
    disk: tuple[Item, ...]
    cost: Cost
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """Most bytes of device memory at once, the device's own context apart."""
        return peak_bytes(self.memory)

    @property
    def on_disk(self) -> int:
        return sum(item.bytes for item in self.disk)

    def fits(self, gib: float) -> bool:
        """Whether a device of this size holds it."""
        return fits(self.total, gib)

    def as_json(self) -> dict[str, object]:
        """Everything as plain values; sizes in bytes."""
        return {
            "source": self.source,
            "memory": [vars(item) for item in self.memory],
            "largest_phase": largest_phase(self.memory),
            "total": self.total,
            "context_assumed": CONTEXT,
            "fits": {str(gib): self.fits(gib) for gib in CARDS},
            "disk": [vars(item) for item in self.disk],
            "on_disk": self.on_disk,
            "cost": vars(self.cost) | {"total": self.cost.total},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Computing:
    """Operations of one network evaluation, and hours of one accelerator that sustains `rate` operations a
    second, about a third of an H100's peak in bfloat16, which a compiled network in large batches reaches and
    an eager one by half; scoring, decoding and evaluation are not counted."""

    rate: ClassVar[float] = 3e14
    flops: int
    hours: float


def estimate(config: RunConfig, *, architecture: str | None = None) -> Estimate:
    """What a run will take: memory of the device by item and phase, bytes on disk, network evaluations.

    Args:
        config: Its settings.
        architecture: A name of `config.families.checkpoints()` to take in place of what `model.path` says.
    Raises:
        MissingError: the model is no folder and its name tells no known architecture.
        PolicyError: a family or a configuration that cannot be built.
    """
    sizes = sizes_of(config, architecture)
    memory = (*_held(config, sizes), *_phases(config, sizes))
    disk = tuple(disk_items(config, architecture=architecture))
    return Estimate(sizes.blueprint.source, memory, disk, run_cost(config), tuple(_notes(config)))


def _notes(config: RunConfig) -> Iterator[str]:
    for scorer in chain(*config.scorers.values()):
        if scorer_bytes(scorer) is None:
            yield f"scorer {scorer.name} ({scorer.path}): size not known, not counted"
    if config.offline.source is not None and config.offline.limit is None:
        yield (
            "offline.limit is null: how many offline pairs there are is not known, their latents are not "
            "counted"
        )


def computing(config: RunConfig, *, architecture: str | None = None) -> Computing:
    """How much a run computes: operations of one network evaluation, and hours for all of them."""
    each = flops(sizes_of(config, architecture).key)
    return Computing(each, run_cost(config).total * each / Computing.rate / 3600)


def advise(
    config: RunConfig, *, architecture: str | None = None, cards: Sequence[float] = CARDS
) -> list[Advice]:
    """What makes the run fit on cards of the given GiB, cheapest first.

    Settings are added in the order of their price until the run fits; then each that is not needed is left
    out again.
    """
    total_with, found = partial(_total_with, config, architecture), []
    for gib in cards:
        steps = list(counted_savings(config))
        chosen: list[Change] = []
        while not fits(total_with(chosen), gib) and steps:
            chosen.append(steps.pop(0))
        if not fits(total_with(chosen), gib):
            found.append(Advice(gib, None, total_with(chosen)))
            continue
        for change in reversed(chosen):
            fewer = [other for other in chosen if other is not change]
            if fits(total_with(fewer), gib):
                chosen = fewer
        found.append(Advice(gib, tuple(chosen), total_with(chosen)))
    return found


def _total_with(config: RunConfig, architecture: str | None, changes: Sequence[Change]) -> int:
    """Most bytes at once after the changes; more than there is anywhere if they cannot be made together."""
    values = config.model_dump(mode="json")
    for setting in (setting for change in changes for setting in change.settings):
        path, text = setting.split("=")
        *groups, last = path.split(".")
        target: Any = values
        for name in groups:
            target = target[int(name)] if isinstance(target, list) else target[name]
        target[last] = parse_yaml(text, setting)
    # Adapters take the place of smaller copies, which are then left out as not needed.
    if values["tuning"]["kind"] == "lora":
        values["tuning"].update(WITHOUT_COPIES)
    try:
        return estimate(RunConfig.model_validate(values), architecture=architecture).total
    except (ConfigError, ValueError):
        return 2**62


# ---- memory ------------------------------------------------------------------------------------------------


def _held(config: RunConfig, sizes: Sizes) -> Iterator[Item]:
    """Weights that stay: components, versions, scorers."""
    for part in sizes.blueprint.components:
        phase = "encode texts" if part.name.startswith("text_encoder") else "always"
        yield Item(part.name, f"{part.parameters:,} {part.dtype}", part.bytes, phase)
    if config.tuning.kind == "lora":
        adapters = versions(config)
        yield Item("adapters", ", ".join(adapters), len(adapters) * FLOAT32 * sizes.trained)
    else:
        yield from _copies(config, sizes)
    if config.algorithm.improvement is not None:
        count = sizes.denoiser.parameters
        yield Item("improvement model", f"2 x {count:,} float32", 2 * FLOAT32 * count)
    for scorer in chain(*config.scorers.values()):
        size = scorer_bytes(scorer)
        if size:
            yield Item(f"scorer {scorer.name}", scorer.precision, size)


def _copies(config: RunConfig, sizes: Sizes) -> Iterator[Item]:
    """Frozen copies that stay on the device besides the denoiser, which is "current"."""
    if config.tuning.reference_device == "cpu":
        return
    names = [name for name in versions(config) if name != "current"]
    if config.tuning.reference_dtype != "float32":
        names = [name for name in names if name not in ("base", "reference")]
        if config.algorithm.needs_reference:
            yield Item("reference", config.tuning.reference_dtype, sizes.lowered)
    if names:
        yield Item("copies of the denoiser", ", ".join(names), len(names) * sizes.denoiser.bytes)


def _moved_in(config: RunConfig, sizes: Sizes) -> tuple[int, int]:
    """(bytes of a copy that is on the device for its pass in training, and the same in drawing)."""
    tuning, algorithm = config.tuning, config.algorithm
    if tuning.kind == "lora" or (tuning.reference_device == "same" and tuning.reference_dtype == "float32"):
        return 0, 0
    reference = sizes.denoiser.bytes if tuning.reference_dtype == "float32" else sizes.lowered
    passes = [sizes.denoiser.bytes] * algorithm.needs_old_policy + [reference] * algorithm.needs_reference
    passes = passes if tuning.reference_device == "cpu" else []
    # The base lies in main memory either way: it is moved in for an anchor, and where it draws itself.
    passes += [sizes.denoiser.bytes] * (algorithm.anchor_version == "base")
    return max(passes, default=0), sizes.denoiser.bytes


def _phases(config: RunConfig, sizes: Sizes) -> Iterator[Item]:
    training = config.training
    _, forward = activations(sizes.key, False, config.model.inference_precision, False)
    held, peak = activations(sizes.key, True, training.mixed_precision, training.gradient_checkpointing)
    moved_in_training, moved_in_drawing = _moved_in(config, sizes)
    count, size = f"{sizes.trained:,} float32", FLOAT32 * sizes.trained
    yield Item("gradients", count, size, "train")
    yield Item("AdamW moments", f"2 x {count}", 2 * size, "train")
    if training.ema_decay > 0:
        yield Item("moving average", count, size, "train")
    shape = training_shape(config)
    alive = shape.activations(held=held, peak=peak, forward=forward, moved=moved_in_training)
    yield Item("activations, training", f"{shape.rows} rows", alive, "train")
    # Noisy, noise, target and prediction of one micro-batch, float32.
    latents = 4 * shape.rows * sizes.latent
    yield Item("latents of a batch", f"{training.batch_size} rows", latents, "train")
    images, rows = max(draws(config), key=lambda draw: draw[0] * draw[1])
    yield Item("activations, drawing", f"{images * rows} rows", forward.at(images * rows), "draw")
    one = decoding(sizes.key, config.model.vae_tiling)
    decoded = one + images * sizes.image if config.model.vae_slicing else images * one
    yield Item("activations, decoding", f"{images} images", decoded, "decode")
    if moved_in_drawing:
        for phase in ("draw", "decode"):
            yield Item("a copy moved in", "the version that draws", moved_in_drawing, phase)
    merged = merged_bytes(sizes.blueprint) if config.explore.merge_lora else 0
    if merged:
        yield Item("merged weights", "adapted modules", merged, "draw")


# ---- disk --------------------------------------------------------------------------------------------------


def disk_items(config: RunConfig, *, architecture: str | None = None) -> Iterator[Item]:
    """What a run will leave on disk; nothing is measured but the sizes of tensors."""
    sizes = sizes_of(config, architecture)
    explore, training = config.explore, config.training
    cost, trained = run_cost(config), FLOAT32 * sizes.trained
    if cost.images:
        yield Item("latents and rows of drawn images", f"{cost.images:,}", cost.images * (sizes.latent + ROW))
    if config.offline.limit is not None and config.offline.source is not None:
        pairs = config.offline.limit
        yield Item("offline pairs", f"{pairs:,}", pairs * (2 * (sizes.latent + ROW) + ROW))
    if config.algorithm.draws_first:
        images = explore.prompts_per_iteration * explore.images_per_prompt
        steps = explore.sampler.steps + 1
        yield Item("trajectories of one iteration", f"{images:,} x {steps}", images * steps * sizes.latent)
    yield Item("iterates", f"{explore.iterations}", explore.iterations * trained)
    algorithm = config.algorithm
    kept = 3 + (training.ema_decay > 0) + len(algorithm.moving_versions)
    # The newest two stay, and a third is being written.
    yield Item("checkpoints of an iteration", "3", 3 * kept * trained)
    if algorithm.reference_memory:
        yield Item("references", "2", 2 * trained)
    evaluation = config.evaluation
    beside = config.baseline.offline_dpo + len(config.baseline.contenders) + len(evaluation.base_guidances)
    evaluated = 1 + (explore.iterations if evaluation.every_iteration else 1) + beside
    extra = evaluation.vendi_prompts * max(0, evaluation.vendi_images - evaluation.images_per_prompt)
    images = evaluated * (evaluation.num_prompts * evaluation.images_per_prompt + extra)
    yield Item("evaluation images", f"{images:,}", int(images * sizes.image / FLOAT32 * PNG_SHARE))
    is_lora = config.tuning.kind == "lora"
    whole = sum(part.bytes for part in sizes.blueprint.components)
    yield Item("export", "LoRA, twice" if is_lora else "whole pipeline", 2 * trained if is_lora else whole)
