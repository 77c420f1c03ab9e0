"""Images changed in ways that keep their meaning (for training) or spoil it (as negatives of a judge)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Return images (B,3,H,W) in [0,1] slightly moved, scaled, turned, re-coloured, blurred or noised.

    No mirror images and no change of hue: they would change what an image of an arrow or a heart means.
    """
    num = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(num, generator=generator) * (high - low) + low

    angle = uniform(-1, 1) * math.radians(8) * strength
    scale = 1 + uniform(-0.12, 0.12) * strength
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = [uniform(-0.1, 0.1) * strength for _ in range(2)]
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1  # outside is white
    shape = (num, 1, 1, 1)
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    moved = (moved - mean) * (1 + uniform(-0.15, 0.15) * strength).view(shape) + mean
    moved = moved + uniform(-0.08, 0.08).view(shape) * strength
    grey = moved.mean(dim=1, keepdim=True)
    moved = grey + (moved - grey) * (1 + uniform(-0.2, 0.2) * strength).view(shape)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.lerp(moved, soft, (uniform(-1, 1).clamp_min(0) * strength).view(shape))
    noise = torch.randn(moved.shape, generator=generator)
    return (moved + noise * (uniform(-0.06, 0.05).clamp_min(0) * strength).view(shape)).clamp(0, 1)


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images that no caption fits any more: one of five ways each, drawn at random.

    Blends of two images, shuffled 16-px patches, heavy blur, strong noise, and images faded towards grey
    or white.
    """
    num, _, height, width = images.shape
    kind = torch.randint(5, (num,), generator=generator)
    share = torch.rand(num, 1, 1, 1, generator=generator)
    others = images[torch.randperm(num, generator=generator)]
    blended = torch.lerp(images, others, 0.3 + 0.4 * share)
    tiles = F.unfold(images, 16, stride=16)
    order = torch.stack([torch.randperm(tiles.shape[-1], generator=generator) for _ in range(num)])
    tiles = tiles.gather(2, order[:, None, :].expand_as(tiles))
    shuffled = F.fold(tiles, (height, width), 16, stride=16)
    blurred = F.interpolate(
        F.interpolate(images, scale_factor=0.125, mode="area"), (height, width), mode="bilinear"
    )
    noisy = images + torch.randn(images.shape, generator=generator) * (0.25 + 0.5 * share)
    flat = torch.where(share < 0.5, torch.ones_like(share), torch.rand(num, 3, 1, 1, generator=generator))
    faded = torch.lerp(images, flat.expand_as(images), 0.75 + 0.25 * share)
    stacked = torch.stack([blended, shuffled, blurred, noisy, faded])
    return stacked[kind, torch.arange(num)].clamp(0, 1)
