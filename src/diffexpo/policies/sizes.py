"""Sizes of images that a model can draw, found from configurations alone: its own, `model.resolution`,
`model.buckets`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModelMixin

from diffexpo.config.families import Family
from diffexpo.config.schema import ModelConfig
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.policies.autoencoder import vae_factor

Shape = tuple[int, int, int]
Size = tuple[int, int]
# How far the area of a bucket may be from the first one's where the noise levels follow from the area.
AREA_TOLERANCE = 0.2


def patch_of(card: Family, network: ModelMixin) -> int:
    """Latents that a denoiser takes together in each direction: 1 for UNets."""
    return card.patch or int(network.config.get("patch_size") or 1)


def latent_shape(
    card: Family,
    denoiser: ModelMixin,
    vae: ModelMixin,
    model: ModelConfig,
    where: str,
    own: int | Sequence[int] | None = None,
) -> Shape:
    """(C, h, w) of latents in `model.resolution`, else in the checkpoint's `own` size in latents, which by
    default the denoiser's file says; 512 pixels of SD 1.5 are (4, 64, 64). `where` names the model.

    Raises:
        PolicyError: no size is known.
        ConfigError: the resolution does not divide into whole latents and patches.
    """
    channels, size = vae.config.latent_channels, own or denoiser.config.get("sample_size")
    if model.resolution is not None:
        factor = vae_factor(vae)
        height, width = checked_size(model.resolution, factor * patch_of(card, denoiser), where)
        return channels, height // factor, width // factor
    if size is None:
        raise PolicyError(
            f"{where}: the denoiser's config.json has no sample_size; set model.resolution (pixels)"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def checked_size(size: int | Size, multiple: int, where: str, key: str = "model.resolution") -> Size:
    """(height, width) in pixels, which must be multiples of `multiple`, for the setting `key` of the model
    `where`.

    Raises:
        ConfigError: it does not divide into whole latents and patches; names the nearest size that does.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height % multiple or width % multiple:
        near = [_nearest_multiple(side, multiple) for side in (height, width)]
        shown = size if isinstance(size, int) else list(size)
        raise ConfigError(f"{key}={shown}: expected multiples of {multiple} for {where}; nearest is {near}")
    return height, width


def size_of_aspect(aspect: str, area: int, multiple: int) -> Size:
    """(height, width) in pixels of an aspect ratio "width:height" at about an area, as multiples of a number.

    width = sqrt(area * ratio),   height = sqrt(area / ratio),   each rounded

    Returns:
        The size; ("3:2", 1024 * 1024, 8) is (840, 1256), ("1:1", 512 * 512, 8) is (512, 512).
    """
    width, height = (int(side) for side in aspect.split(":"))
    sides = math.sqrt(area / (width / height)), math.sqrt(area * (width / height))
    return _nearest_multiple(sides[0], multiple), _nearest_multiple(sides[1], multiple)


def bucket_shapes(
    card: Family, network: ModelMixin, latent_shape: Shape, factor: int, model: ModelConfig, where: str
) -> tuple[Shape, ...]:
    """Shapes of the latents of all sizes that a run's images may have: `latent_shape`, then those of
    `model.buckets`. `factor` is the number of pixels of a latent in each direction, `where` names the model.

    Raises:
        ConfigError: a size that does not divide, that is there already, or that the denoiser knows no
            positions for.
    """
    channels, *first = latent_shape
    multiple = factor * patch_of(card, network)
    sizes: dict[Size, str] = {(first[0] * factor, first[1] * factor): "the first size"}
    (first_size,) = sizes
    for index, bucket in enumerate(model.buckets):
        key = f"model.buckets.{index}"
        if isinstance(bucket, str):
            size = size_of_aspect(bucket, math.prod(first_size), multiple)
        else:
            size = checked_size(bucket, multiple, where, key)
        if size in sizes:
            shown = bucket if isinstance(bucket, str) else list(bucket)
            raise ConfigError(f"{key}={shown} is {list(size)}, as is {sizes[size]}; expected another size")
        check_positions(network.config, (size[0] // multiple, size[1] // multiple), key)
        sizes[size] = key
    return tuple((channels, height // factor, width // factor) for height, width in sizes)


def check_positions(config: Mapping[str, Any], patches: Size, key: str = "model.resolution") -> None:
    """Raise ConfigError if an image has more patches in a direction than the denoiser's table has
    positions."""
    known = config.get("pos_embed_max_size")
    if known is not None and max(patches) > known:
        raise ConfigError(
            f"{key}: gives {patches[0]} x {patches[1]} patches, and the transformer knows positions for "
            f"{known} in each direction; expected a smaller image"
        )


def check_areas(shapes: tuple[Shape, ...], where: str) -> None:
    """Raise ConfigError if a bucket's area is far from the first one's, for a model whose noise levels follow
    from the area."""
    first, lowest, highest = math.prod(shapes[0]), 1 - AREA_TOLERANCE, 1 + AREA_TOLERANCE
    for index, shape in enumerate(shapes[1:]):
        share = math.prod(shape) / first
        if abs(share - 1) > AREA_TOLERANCE:
            raise ConfigError(
                f"model.buckets.{index} has {share:.2f} times the area of the first size: the noise levels "
                f"of {where} follow from the area, and all images of a run are noised as those of the first "
                f"size are; expected {lowest:g} to {highest:g} times its area (an aspect ratio such as "
                '"3:2" keeps it)'
            )


def _nearest_multiple(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
