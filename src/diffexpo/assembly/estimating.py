"""What a run will take, from its configuration alone: memory, disk, network evaluations. No weight is
read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from diffexpo.assembly.aliases import EMBEDDED, resolve
from diffexpo.assembly.evaluating import evaluation_batch
from diffexpo.config import RunConfig
from diffexpo.config.methods.data import Pairs, TransitionPairs, Transitions
from diffexpo.config.rewards import RewardCard
from diffexpo.config.rules import AUTOCAST_TYPES
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError
from diffexpo.online.cost import Cost, run_cost
from diffexpo.policies.blueprint import (
    Activations,
    Blueprint,
    forward_flops,
    make_trainable,
    measure_decoder,
    measure_denoiser,
    merged_bytes,
    read_blueprint,
)
from diffexpo.policies.frozen import lowered_bytes
from diffexpo.training.engine import AUTOCAST
from diffexpo.training.memory import (
    CONTEXT,
    FLOAT32,
    Item,
    PerRow,
    TrainingShape,
    drawing_items,
    fits,
    largest_phase,
    peak_bytes,
    training_items,
)

CARDS = (12, 24, 80)
WITHOUT_COPIES = {"reference_dtype": "float32", "reference_device": "same"}
# A PNG of a photograph is about half of its bytes, a row of the store's tables about 1 KiB.
PNG_SHARE, ROW = 0.5, 1024
# Operations a second that hours are told for: about a third of an H100's peak in bfloat16, which a compiled
# network in large batches reaches; an eager one reaches half of it.
SUSTAINED = 3e14


@dataclass(frozen=True)
class Change:
    """Settings that make a run smaller, and what they cost."""

    settings: tuple[str, ...]
    price: str


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
        """Whether a device of so many GiB holds it."""
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
    """Operations of one network evaluation, and hours of one accelerator that sustains `SUSTAINED`; scoring,
    decoding and evaluation are not counted.
    """

    flops: int
    hours: float


def estimate(config: RunConfig, *, architecture: str | None = None) -> Estimate:
    """What a run will take.

    Args:
        config: Its settings.
        architecture: A name of `diffexpo.config.architectures` to take in place of what `model.path` says.
    Returns:
        Memory of the device by item and phase, bytes on disk, network evaluations.
    Raises:
        MissingError: the model is no folder and its name tells no known architecture.
        PolicyError: a family or a configuration that cannot be built.
    """
    sizes = _sizes(config, architecture)
    notes = [*_scorer_notes(config), *_data_notes(config)]
    memory = [*_held(config, sizes), *_phases(config, sizes)]
    return Estimate(sizes.source, tuple(memory), tuple(_disk(config, sizes)), run_cost(config), tuple(notes))


def computing(config: RunConfig, *, architecture: str | None = None) -> Computing:
    """How much a run computes: operations of one network evaluation, and hours for all of them."""
    flops = _flops(_sizes(config, architecture).key)
    return Computing(flops, run_cost(config).total * flops / SUSTAINED / 3600)


def picture_sizes(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of every size that a run's pictures may have, the first one first."""
    return _sizes(config, None).picture_sizes


def disk_items(config: RunConfig, *, architecture: str | None = None) -> list[Item]:
    """What a run will leave on disk; nothing is measured but the sizes of tensors."""
    return list(_disk(config, _sizes(config, architecture)))


def advise(
    config: RunConfig, *, architecture: str | None = None, cards: Sequence[float] = CARDS
) -> list[Advice]:
    """What makes the run fit on cards of so many GiB, cheapest first.

    Settings are added in the order of their price until the run fits; then each that is not needed is left
    out again.
    """
    found = []
    for gib in cards:
        steps = list(_smaller(config))
        chosen: list[Change] = []
        total = estimate(config, architecture=architecture).total
        while not fits(total, gib) and steps:
            chosen.append(steps.pop(0))
            total = _total_with(config, chosen, architecture)
        if not fits(total, gib):
            found.append(Advice(gib, None, total))
            continue
        for change in reversed(chosen):
            fewer = [other for other in chosen if other is not change]
            if fits(_total_with(config, fewer, architecture), gib):
                chosen = fewer
        found.append(Advice(gib, tuple(chosen), _total_with(config, chosen, architecture)))
    return found


# ---- sizes of the networks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """What the blueprint tells, as numbers; activations are measured when they are asked for."""

    key: tuple[str, str, str | None]
    source: str
    components: tuple[tuple[str, int, int, str], ...]
    trained: int
    latent_shape: tuple[int, int, int]
    picture_size: tuple[int, int]
    picture_sizes: tuple[tuple[int, int], ...]
    denoiser: str
    lowered: int
    merged: int

    @property
    def latent(self) -> int:
        """Bytes of one stored latent."""
        channels, height, width = self.latent_shape
        return FLOAT32 * channels * height * width

    @property
    def picture(self) -> int:
        """Bytes of one decoded picture."""
        return FLOAT32 * 3 * self.picture_size[0] * self.picture_size[1]

    @property
    def denoiser_bytes(self) -> int:
        return next(size for name, _, size, _ in self.components if name == self.denoiser)


def _sizes(config: RunConfig, architecture: str | None) -> _Sizes:
    # What decides sizes, as text: settings are no keys of a cache.
    asked = config.model
    model = ModelConfig(
        path=asked.path,
        dtype=asked.dtype,
        resolution=asked.resolution,
        buckets=asked.buckets,
        drop_t5=asked.drop_t5,
        max_sequence_length=asked.max_sequence_length,
    )
    return _read_sizes(model.model_dump_json(), config.tuning.model_dump_json(), architecture)


@lru_cache(maxsize=64)
def _read_sizes(model: str, tuning: str, architecture: str | None) -> _Sizes:
    blueprint, components, trained = _prepared(model, tuning, architecture)
    return _Sizes(
        key=(model, tuning, architecture),
        source=blueprint.source,
        components=components,
        trained=trained,
        latent_shape=blueprint.latent_shape,
        picture_size=blueprint.picture_size,
        picture_sizes=blueprint.picture_sizes,
        denoiser=blueprint.denoiser_name,
        lowered=lowered_bytes(blueprint.denoiser, torch.bfloat16),
        merged=merged_bytes(blueprint),
    )


@lru_cache(maxsize=4)
def _prepared(
    model: str, tuning: str, architecture: str | None
) -> tuple[Blueprint, tuple[tuple[str, int, int, str], ...], int]:
    """The networks as a run has them, what they took before adapters came, and the number of trained
    elements."""
    settings = ModelConfig.model_validate_json(model)
    blueprint = read_blueprint(resolve(settings.path), settings, architecture=architecture)
    components = tuple(
        (part.name, part.parameters, part.bytes, part.dtype) for part in blueprint.components()
    )
    return blueprint, components, make_trainable(blueprint, TuningConfig.model_validate_json(tuning))


@lru_cache(maxsize=64)
def _activations(
    key: tuple[str, str, str | None], has_gradient: bool, mixed_precision: str, gradient_checkpointing: bool
) -> tuple[PerRow, PerRow]:
    """What is held and what is the peak, as functions of the rows."""
    blueprint, _, _ = _prepared(*key)
    autocast = AUTOCAST.get(mixed_precision)

    def measured(rows: int) -> Activations:
        return measure_denoiser(
            blueprint,
            rows=rows,
            has_gradient=has_gradient,
            autocast=autocast,
            gradient_checkpointing=gradient_checkpointing,
        )

    one = measured(1)
    # Copies of weights do not grow with the rows; those of adapters are too small to be told apart.
    if autocast is None or TuningConfig.model_validate_json(key[1]).kind == "lora":
        return PerRow(one.held), PerRow(one.peak)
    two = measured(2)
    return (
        PerRow(two.held - one.held, 2 * one.held - two.held),
        PerRow(two.peak - one.peak, 2 * one.peak - two.peak),
    )


@lru_cache(maxsize=64)
def _decoding(key: tuple[str, str, str | None], is_tiled: bool) -> Activations:
    return measure_decoder(_prepared(*key)[0], is_tiled=is_tiled)


@lru_cache(maxsize=64)
def _flops(key: tuple[str, str, str | None]) -> int:
    return forward_flops(_prepared(*key)[0])


# ---- memory ------------------------------------------------------------------------------------------------


def _held(config: RunConfig, sizes: _Sizes) -> Iterator[Item]:
    """Weights that stay: components, versions, scorers."""
    for name, parameters, size, dtype in sizes.components:
        is_text = name.startswith("text_encoder")
        yield Item(name, f"{parameters:,} {dtype}", size, "encode texts" if is_text else "always")
    if config.tuning.kind == "lora":
        adapters = _versions(config)
        yield Item("adapters", ", ".join(adapters), len(adapters) * FLOAT32 * sizes.trained)
    else:
        yield from _copies(config, sizes)
    if config.algorithm.improvement is not None:
        network = next(parameters for name, parameters, _, _ in sizes.components if name == sizes.denoiser)
        yield Item("improvement model", f"2 x {network:,} float32", 2 * FLOAT32 * network)
    for scorer in (*config.rewards, *config.evaluation.judges):
        size = _scorer_bytes(scorer)
        if size:
            yield Item(f"scorer {scorer.name}", scorer.precision, size)


def _copies(config: RunConfig, sizes: _Sizes) -> Iterator[Item]:
    """Frozen copies that stay on the device beside the denoiser, which is "current"."""
    if config.tuning.reference_device == "cpu":
        return
    names = [name for name in _versions(config) if name != "current"]
    if config.tuning.reference_dtype != "float32":
        names = [name for name in names if name not in ("base", "reference")]
        if config.algorithm.needs_reference:
            yield Item("reference", config.tuning.reference_dtype, sizes.lowered)
    if names:
        yield Item("copies of the denoiser", ", ".join(names), len(names) * sizes.denoiser_bytes)


def _moved_in(config: RunConfig, sizes: _Sizes) -> tuple[int, int]:
    """(bytes of a copy that is on the device for its pass in training, and the same in drawing)."""
    tuning, algorithm = config.tuning, config.algorithm
    if tuning.kind == "lora" or (tuning.reference_device == "same" and tuning.reference_dtype == "float32"):
        return 0, 0
    reference = sizes.denoiser_bytes if tuning.reference_dtype == "float32" else sizes.lowered
    passes = [sizes.denoiser_bytes] * algorithm.needs_old_policy + [reference] * algorithm.needs_reference
    # The base draws in its evaluation wherever it lies otherwise.
    return max(passes, default=0) if tuning.reference_device == "cpu" else 0, sizes.denoiser_bytes


def _versions(config: RunConfig) -> list[str]:
    """Versions of the weights beside the frozen network: what `online` and `training` copy."""
    algorithm = config.algorithm
    names = ["current"] if config.tuning.kind == "lora" else ["current", "base"]
    if not config.algorithm.draws_first:
        names.append("main")
    if algorithm.needs_reference and algorithm.moves_reference:
        names.append("reference")
    return [*names, "old"] if algorithm.needs_old_policy else names


def _scorer_bytes(scorer: RewardCard) -> int | None:
    """Bytes of a scorer's network; None where its size is not known, 0 where it has none here."""
    if scorer.is_sized_by_files and scorer.path is not None:
        path = Path(resolve(scorer.path) if scorer.path.startswith(EMBEDDED) else scorer.path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if files:
            return sum(file.stat().st_size for file in files)
    count = scorer.num_parameters
    return None if count is None else count * (4 if scorer.precision == "float32" else 2)


def _phases(config: RunConfig, sizes: _Sizes) -> Iterator[Item]:
    training = config.training
    _, forward = _activations(sizes.key, False, "no", False)
    held, peak = _activations(sizes.key, True, training.mixed_precision, training.gradient_checkpointing)
    moved_in_training, moved_in_drawing = _moved_in(config, sizes)
    yield from training_items(
        sizes.trained,
        has_average=training.ema_decay > 0,
        held=held,
        peak=peak,
        forward=forward,
        shape=_training_shape(config),
        moved=moved_in_training,
    )
    yield Item("latents of a batch", f"{training.batch_size} rows", _batch_bytes(config, sizes), "train")
    images, rows = max(_draws(config), key=lambda draw: draw[0] * draw[1])
    decoding = _decoding(sizes.key, config.model.vae_tiling)
    yield from drawing_items(
        images,
        rows_per_image=rows,
        forward=forward,
        decoder=PerRow(decoding.peak),
        picture=sizes.picture,
        is_sliced=config.model.vae_slicing,
        moved=moved_in_drawing,
        merged=sizes.merged if config.explore.merge_lora else 0,
    )


def _draws(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(images, rows of each) of a network call wherever images are drawn."""
    explore, evaluation = config.explore, config.evaluation
    yield evaluation_batch(config), 2 if evaluation.sampler.guidance != 1.0 else 1
    if config.algorithm.improvement is not None:
        # Neither condition, the image alone, image and text.
        yield explore.batch_size, 3
    elif config.algorithm.collects(config):
        yield explore.batch_size, 2 if explore.sampler.guidance != 1.0 else 1


def _training_shape(config: RunConfig) -> TrainingShape:
    """Rows of one micro-batch, as the methods run them."""
    training, algorithm = config.training, config.algorithm
    has_reference = config.algorithm.needs_reference
    data = algorithm.data
    if isinstance(data, Transitions | TransitionPairs):
        guided = 2 if config.explore.sampler.guidance != 1.0 else 1
        rows = training.micro_batch_size * guided * data.images_per_row
        return TrainingShape(rows, rows if has_reference else 0)
    if not isinstance(data, Pairs):
        return TrainingShape(training.micro_batch_size, training.micro_batch_size if has_reference else 0)
    rows = 2 * training.micro_batch_size
    if training.pair_gradient == "two_pass":
        return TrainingShape(training.micro_batch_size, 0, rows)
    # Contrast pairs come beside the preference pairs, and their graph is held with theirs.
    rows += 2 * data.contrast_pairs(training.micro_batch_size)
    return TrainingShape(rows, rows if has_reference else 0)


def _batch_bytes(config: RunConfig, sizes: _Sizes) -> int:
    """Latents of one micro-batch: noisy, noise, target and prediction, float32."""
    return 4 * _training_shape(config).rows * sizes.latent


# ---- disk --------------------------------------------------------------------------------------------------


def _disk(config: RunConfig, sizes: _Sizes) -> Iterator[Item]:
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
    kept = 3 + (training.ema_decay > 0) + algorithm.needs_old_policy
    # The newest two stay, and a third is being written.
    yield Item("checkpoints of an iteration", "3", 3 * kept * trained)
    pictures = _evaluated_pictures(config)
    yield Item("evaluation pictures", f"{pictures:,}", int(pictures * sizes.picture / FLOAT32 * PNG_SHARE))
    is_lora = config.tuning.kind == "lora"
    whole = sum(size for _, _, size, _ in sizes.components)
    yield Item("export", "LoRA, twice" if is_lora else "whole pipeline", 2 * trained if is_lora else whole)


def _evaluated_pictures(config: RunConfig) -> int:
    evaluation, iterations = config.evaluation, config.explore.iterations
    versions = 1 + (iterations if evaluation.every_iteration else 1) + config.baseline.offline_dpo
    extra = evaluation.vendi_prompts * max(0, evaluation.vendi_images - evaluation.images_per_prompt)
    return versions * (evaluation.num_prompts * evaluation.images_per_prompt + extra)


# ---- what would make it fit --------------------------------------------------------------------------------


def _smaller(config: RunConfig) -> Iterator[Change]:
    """Settings that lower the peak, each on top of the ones before, in order of what they cost."""
    model, training = config.model, config.training
    if not model.vae_slicing:
        yield Change(("model.vae_slicing=true",), "same pictures up to rounding")
    for images in (16, 8, 4):
        if config.explore.batch_size > images:
            yield Change((f"explore.batch_size={images}",), "slower drawing")
            break
    if not training.gradient_checkpointing:
        yield Change(
            ("training.gradient_checkpointing=true",), "same result, a third more compute in training"
        )
    size = training.micro_batch_size
    while size > 1:
        size = max(divisor for divisor in range(1, size) if training.batch_size % divisor == 0)
        yield Change((f"training.micro_batch_size={size}",), "same result up to rounding, slower")
    if isinstance(config.algorithm.data, Pairs) and training.pair_gradient == "joint":
        yield Change(("training.pair_gradient=two_pass",), "same result, one more forward pass")
    for images in (4, 1):
        if config.explore.batch_size > images:
            yield Change((f"explore.batch_size={images}",), "much slower drawing")
    for index, reward in enumerate(config.rewards):
        if _scorer_bytes(reward) and reward.precision == "float32":
            yield Change((f"rewards.{index}.precision=float16",), "scores move a little")
    for index, judge in enumerate(config.evaluation.judges):
        if _scorer_bytes(judge) and judge.precision == "float32":
            yield Change((f"evaluation.judges.{index}.precision=float16",), "scores move a little")
    if config.tuning.kind == "full":
        yield from _smaller_copies(config)
    if training.mixed_precision == "no" and config.tuning.kind == "lora":
        yield Change(("training.mixed_precision=bf16",), "rounding; faster")
    if config.tuning.kind == "full":
        lora = ("tuning.kind=lora", "model.dtype=bfloat16", "training.mixed_precision=bf16")
        own = [
            f"tuning.{name}={value}"
            for name, value in WITHOUT_COPIES.items()
            if getattr(config.tuning, name) != value
        ]
        yield Change((*lora, *own), "trains adapters on a half-precision base; takes a larger learning rate")
    elif model.dtype == "float32":
        yield Change(("model.dtype=bfloat16",), "the frozen base in half precision")
    if not model.vae_tiling:
        yield Change(("model.vae_tiling=true",), "pictures above the autoencoder's own size change a little")
    if not model.drop_t5:
        yield Change(("model.drop_t5=true",), "Stable Diffusion 3 only: text is understood less well")


def _smaller_copies(config: RunConfig) -> Iterator[Change]:
    """Settings of full fine-tuning's frozen copies."""
    tuning, autocast = config.tuning, config.training.mixed_precision
    if tuning.reference_dtype == "float32" and config.algorithm.needs_reference:
        if autocast == "no":
            both = ("training.mixed_precision=bf16", "tuning.reference_dtype=bfloat16")
            yield Change(both, "rounding; faster")
        else:
            yield Change((f"tuning.reference_dtype={AUTOCAST_TYPES[autocast]}",), "same result")
    if tuning.reference_device == "same":
        price = "same result; moves the denoiser for each pass of the reference"
        yield Change(("tuning.reference_device=cpu",), price)


def _total_with(config: RunConfig, changes: list[Change], architecture: str | None) -> int:
    values = config.model_dump(mode="json")
    for change in changes:
        for setting in change.settings:
            _set(values, *setting.split("="))
    # Adapters take the place of smaller copies, which are then left out as not needed.
    if values["tuning"]["kind"] == "lora":
        values["tuning"].update(WITHOUT_COPIES)
    try:
        return estimate(RunConfig.model_validate(values), architecture=architecture).total
    except (ConfigError, ValueError):
        return 2**62


def _set(values: Mapping[str, object], path: str, text: str) -> None:
    *groups, last = path.split(".")
    target: object = values
    for name in groups:
        target = target[int(name)] if isinstance(target, list) else target[name]
    target[last] = {"true": True, "false": False}.get(text, int(text) if text.isdigit() else text)


# ---- notes -------------------------------------------------------------------------------------------------


def _scorer_notes(config: RunConfig) -> Iterator[str]:
    for scorer in (*config.rewards, *config.evaluation.judges):
        if _scorer_bytes(scorer) is None:
            yield f"scorer {scorer.name} ({scorer.path}): size not known, not counted"


def _data_notes(config: RunConfig) -> Iterator[str]:
    if config.offline.source is not None and config.offline.limit is None:
        yield "offline.limit is null: how many offline pairs there are is not known, their latents are not counted"
