"""The networks of a run without their weights: what they weigh, and what they keep alive while they run.

A model is read from the JSON files of its folder or, where there is no folder, from the published settings in
`architectures.json`. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from diffexpo.bounded.texts import read_json
from diffexpo.config import RunConfig
from diffexpo.config.families import FAMILIES, checkpoints, find_checkpoint
from diffexpo.config.iterates import shape_of_model
from diffexpo.config.rewards import RewardCard
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import MissingError, PolicyError
from diffexpo.estimate.activations import forward_flops, measure_decoder, measure_denoiser
from diffexpo.estimate.memory import FLOAT32, PerRow
from diffexpo.policies.blueprint import Blueprint, Component, make_blueprint, make_trainable, read_described
from diffexpo.policies.copies import lowered_bytes
from diffexpo.policies.loading import read_model_folder
from diffexpo.training.engine import AUTOCAST
from diffexpo.worlds import local_path

PUBLISHED = read_json(Path(__file__).with_name("architectures.json"))
Key = tuple[ModelConfig, TuningConfig, str | None]
"""What decides sizes: model, tuning, `--architecture`."""


def published_settings(name: str) -> dict[str, tuple[str, dict[str, object]]]:
    """Classes and settings of a checkpoint's networks: the published ones that decide sizes; everything else
    is the class's default."""
    kinds, entries = checkpoints()[name][0].parts, PUBLISHED["checkpoints"][name]
    return {part: (kinds[part], _expanded(entry)) for part, entry in entries.items()}


def _expanded(entry: str | Mapping[str, object]) -> dict[str, object]:
    """Settings by their name in the file, or those that are `like` others but for some."""
    if isinstance(entry, str):
        return _expanded(PUBLISHED["parts"][entry])
    base = _expanded(str(entry["like"])) if "like" in entry else {}
    return {**base, **{name: value for name, value in entry.items() if name != "like"}}


def read_blueprint(path: str, model: ModelConfig, *, architecture: str | None = None) -> Blueprint:
    """The networks of a base model on the meta device: of a diffusers folder, of a hub id that
    `find_checkpoint` knows, or of the checkpoint `architecture`, whatever the path says.

    Raises:
        MissingError: neither a folder nor a known architecture.
        PolicyError: a family that no policy reads, or a configuration that its class refuses.
    """
    folder = Path(path).expanduser()
    if architecture is None and folder.is_dir():
        index = read_model_folder(folder)
        card = FAMILIES.get(index.pipeline_class)
        if card is None:
            raise PolicyError(
                f"{path}: model family {index.pipeline_class!r} cannot be estimated; expected one of "
                f"{', '.join(FAMILIES)}"
            )
        return make_blueprint(card, read_described(index, card), model, path, str(folder))
    known = find_checkpoint(architecture or path)
    if known is None:
        raise MissingError(
            f"model.path={path!r}: no such folder, and its name tells no known architecture; name one with "
            f"--architecture ({', '.join(checkpoints())}), or a folder"
        )
    card, checkpoint = known
    described = published_settings(checkpoint.name)
    return make_blueprint(card, described, model, path, f"public settings of {checkpoint.name}")


@dataclass(frozen=True, eq=False)
class Sizes:
    """The networks of a run as it trains them, and the number of trained elements; activations are measured
    when they are asked for."""

    key: Key
    blueprint: Blueprint
    trained: int

    @property
    def denoiser(self) -> Component:
        """What the denoiser occupies without adapters."""
        return next(
            part for part in self.blueprint.components if part.name == self.blueprint.card.denoiser[0]
        )

    @property
    def lowered(self) -> int:
        """Bytes of the denoiser with all that autocast casts in half precision."""
        return lowered_bytes(self.blueprint.denoiser, torch.bfloat16)

    @property
    def latent(self) -> int:
        """Bytes of one stored latent."""
        return FLOAT32 * math.prod(self.blueprint.latent_shape)

    @property
    def image(self) -> int:
        """Bytes of one decoded image."""
        return FLOAT32 * 3 * math.prod(self.blueprint.image_size)


def sizes_of(config: RunConfig, architecture: str | None = None) -> Sizes:
    """The sizes of a run's networks."""
    # Only what decides sizes, so that other settings find the same entry.
    deciding = ("path", "dtype", "resolution", "buckets", "drop_t5", "max_sequence_length")
    model = ModelConfig(**{name: getattr(config.model, name) for name in deciding})
    return _read_sizes((model, config.tuning, architecture))


@lru_cache(maxsize=8)
def _read_sizes(key: Key) -> Sizes:
    model, tuning, architecture = key
    blueprint = read_blueprint(local_path(shape_of_model(model.path)), model, architecture=architecture)
    return Sizes(key, blueprint, make_trainable(blueprint, tuning))


@lru_cache(maxsize=64)
def activations(
    key: Key, has_gradient: bool, mixed_precision: str, gradient_checkpointing: bool
) -> tuple[PerRow, PerRow]:
    """What the denoiser holds and what is its peak, as functions of the rows."""
    autocast = AUTOCAST.get(mixed_precision)
    measured = partial(
        measure_denoiser,
        _read_sizes(key).blueprint,
        has_gradient=has_gradient,
        autocast=autocast,
        gradient_checkpointing=gradient_checkpointing,
    )
    one = measured(rows=1)
    # Copies of weights do not grow with the rows; those of adapters are too small to be told apart.
    if autocast is None or key[1].kind == "lora":
        return PerRow(one.held), PerRow(one.peak)
    two = measured(rows=2)
    pairs = ((one.held, two.held), (one.peak, two.peak))
    held, peak = (PerRow(second - first, 2 * first - second) for first, second in pairs)
    return held, peak


@lru_cache(maxsize=64)
def decoding(key: Key, is_tiled: bool) -> int:
    """Most bytes alive while one latent is decoded."""
    return measure_decoder(_read_sizes(key).blueprint, is_tiled=is_tiled).peak


@lru_cache(maxsize=64)
def flops(key: Key) -> int:
    """Operations of one network evaluation."""
    return forward_flops(_read_sizes(key).blueprint)


def scorer_bytes(scorer: RewardCard) -> int | None:
    """Bytes of a scorer's network; None where its size is not known, 0 where it has none here."""
    if scorer.is_sized_by_files and scorer.path is not None:
        size = sum(file.stat().st_size for file in Path(local_path(scorer.path)).glob("*.safetensors"))
        if size:
            return size
    count = scorer.num_parameters
    return None if count is None else count * (4 if scorer.precision == "float32" else 2)
