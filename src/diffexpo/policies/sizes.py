"""Sizes of images that a model can draw, found from configurations alone: its own, `model.resolution`,
`model.buckets`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from diffexpo.config.families import Family
from diffexpo.config.schema import ModelConfig
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.policies.autoencoder import vae_factor

Shape = tuple[int, int, int]
Size = tuple[int, int]
# How far the area of a bucket may be from the first one's where the noise levels follow from the area.
AREA_TOLERANCE = 0.2


def patch_of(card: Family, network: nn.Module) -> int:
    """Latents that a denoiser takes together in each direction: 1 for UNets."""
    return card.patch or int(network.config.get("patch_size") or 1)


def latent_shape_of(
    config: Mapping[str, object],
    vae: nn.Module,
    where: str,
    *,
    resolution: int | Size | None = None,
    patch: int = 1,
) -> Shape:
    """(C, h, w) of the denoiser's latents, checked against the autoencoder.

    Args:
        config: The denoiser's: `in_channels`, `out_channels`, `sample_size`.
        vae: Its channels and the factor between pixels and latents.
        where: The model, for messages.
        resolution: `model.resolution` in pixels; None takes the denoiser's `sample_size`.
        patch: Latents that the denoiser takes together in each direction; 1 for UNets.
    Returns:
        The shape; 512 pixels of SD 1.5 are (4, 64, 64).
    Raises:
        PolicyError: channel counts differ (an inpainting or editing model), or no size is known.
        ConfigError: the resolution does not divide into whole latents and patches.
    """
    channels = config["in_channels"]
    if channels != config["out_channels"] or channels != vae.config.latent_channels:
        raise PolicyError(
            f"{where}: the denoiser takes {channels} and gives {config['out_channels']} channels, the "
            f"autoencoder has {vae.config.latent_channels}; expected all equal (inpainting and editing "
            "models are not supported)"
        )
    return (channels, *latent_size(config.get("sample_size"), vae, where, resolution, patch))


def latent_size(
    sample_size: int | Sequence[int] | None,
    vae: nn.Module,
    where: str,
    resolution: int | Size | None,
    patch: int = 1,
) -> Size:
    """(h, w) in latents; see `latent_shape_of`."""
    if resolution is None:
        if sample_size is None:
            raise PolicyError(
                f"{where}: the denoiser's config.json has no sample_size; set model.resolution (pixels)"
            )
        height, width = (sample_size,) * 2 if isinstance(sample_size, int) else tuple(sample_size)
        return height, width
    factor = vae_factor(vae)
    height, width = checked_size(resolution, factor * patch, where)
    return height // factor, width // factor


def checked_size(size: int | Size, multiple: int, where: str, key: str = "model.resolution") -> Size:
    """(height, width) in pixels, which must be multiples of a number.

    Args:
        size: One number for squares, or (height, width).
        multiple: Pixels of a latent times latents of a patch.
        where, key: Model and setting, for messages.
    Raises:
        ConfigError: it does not divide into whole latents and patches; names the nearest size that does.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height % multiple or width % multiple:
        near = [_nearest_multiple(side, multiple) for side in (height, width)]
        raise ConfigError(
            f"{key}={size if isinstance(size, int) else list(size)}: "
            f"expected multiples of {multiple} for {where}; nearest is {near}"
        )
    return height, width


def size_of_aspect(aspect: str, area: int, multiple: int) -> Size:
    """(height, width) in pixels of an aspect ratio "width:height" at about an area, as multiples of a number.

    width = sqrt(area * ratio),   height = sqrt(area / ratio),   each rounded

    Returns:
        The size; ("3:2", 1024 * 1024, 8) is (840, 1256), ("1:1", 512 * 512, 8) is (512, 512).
    """
    width, height = (int(side) for side in aspect.split(":"))
    ratio = width / height
    return (
        _nearest_multiple(math.sqrt(area / ratio), multiple),
        _nearest_multiple(math.sqrt(area * ratio), multiple),
    )


def bucket_shapes(
    card: Family, network: nn.Module, latent_shape: Shape, factor: int, model: ModelConfig, where: str
) -> tuple[Shape, ...]:
    """Shapes of the latents of all sizes that a run's pictures may have, `latent_shape` first.

    Args:
        card, network: The denoiser, for its patches and its table of positions.
        latent_shape: Of the first size.
        factor: Pixels of a latent in each direction.
        model: Its `buckets` are the others.
        where: The model, for messages.
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
            raise ConfigError(
                f"{key}={_shown(bucket)} is {list(size)}, as is {sizes[size]}; expected another size"
            )
        check_positions(network.config, (size[0] // multiple, size[1] // multiple), key)
        sizes[size] = key
    return tuple((channels, height // factor, width // factor) for height, width in sizes)


def check_positions(config: Mapping[str, object], patches: Size, key: str = "model.resolution") -> None:
    """Refuse a picture with more patches in a direction than the denoiser's table has positions, if it has
    one.

    Raises:
        ConfigError: says how many there are.
    """
    known = config.get("pos_embed_max_size")
    if known is not None and max(patches) > int(known):
        raise ConfigError(
            f"{key}: gives {patches[0]} x {patches[1]} patches, and the transformer knows positions for "
            f"{known} in each direction; expected a smaller picture"
        )


def check_areas(shapes: tuple[Shape, ...], where: str) -> None:
    """Refuse buckets whose area is far from the first one's, for a model whose noise levels follow from the
    area.

    Raises:
        ConfigError: names the bucket.
    """
    first = math.prod(shapes[0])
    for index, shape in enumerate(shapes[1:]):
        share = math.prod(shape) / first
        if abs(share - 1) > AREA_TOLERANCE:
            raise ConfigError(
                f"model.buckets.{index} has {share:.2f} times the area of the first size: the noise levels "
                f"of {where} follow from the area, and all pictures of a run are noised as those of the "
                f"first size are; expected {1 - AREA_TOLERANCE:g} to "
                f'{1 + AREA_TOLERANCE:g} times its area (an aspect ratio such as "3:2" keeps it)'
            )


def _nearest_multiple(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)


def _shown(bucket: str | Size) -> str:
    return bucket if isinstance(bucket, str) else str(list(bucket))
