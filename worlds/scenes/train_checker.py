"""Trains the two checkers of scenes, of different architecture, on images that they do not share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from diffexpo.rewards.scenes import (
    CONFIG,
    LOOKS,
    NAMES,
    NETWORKS,
    SPOILT,
    STRIDE,
    WEIGHTS,
    find_sprites,
)
from diffexpo.worlds.scenes.compose import IMAGE_SIZE
from worlds.emoji.fit import autocast, choose_device, save_tensors
from worlds.emoji.layout import half_copy
from worlds.scenes.fit import Schedule, fit
from worlds.scenes.spoil import Labelled, spoilt_scene

BATCH = 64
RECOVERED, NOISY, BLURRED = 20, 4, 4
"""Images of a batch that went through the autoencoder, that are decoded noisy latents, and that are blurred
until nothing can be told: the last two hold nothing that counts."""
POOL = 3072
PLACES = IMAGE_SIZE // STRIDE
SPREAD = 3.5


@dataclass(frozen=True)
class Checker:
    """Architecture, width and seed of a checker, and how its training images are changed."""

    architecture: str
    width: int
    seed: int
    is_noised: bool


CHECKERS = {
    "checker_train": Checker("convolutional", 40, 11, is_noised=True),
    "checker_heldout": Checker("mixer", 56, 12, is_noised=False),
}


@dataclass
class Targets:
    """What a detector should say: heat (B, 2, 16, 16), names and looks (B, 16, 16), -1 where nothing is."""

    heat: Tensor
    names: Tensor
    looks: Tensor

    def rows(self, index: Tensor) -> Targets:
        """Some rows, copied."""
        return Targets(self.heat[index], self.names[index], self.looks[index])


def targets_of(labels: Sequence[Sequence[Labelled]]) -> Targets:
    """Targets of labelled images: a Gaussian bump at each centre, and its name and look around it."""
    heat = np.zeros((len(labels), 2, PLACES, PLACES), dtype=np.float32)
    names = -np.ones((len(labels), PLACES, PLACES), dtype=np.int64)
    looks = names.copy()
    y, x = np.mgrid[0:PLACES, 0:PLACES] * STRIDE + STRIDE / 2
    for row, sprites in enumerate(labels):
        for sprite in sprites:
            bump = np.exp(-((y - sprite.y) ** 2 + (x - sprite.x) ** 2) / (2 * SPREAD**2))
            kind = 0 if sprite.is_good else 1
            heat[row, kind] = np.maximum(heat[row, kind], bump)
            if sprite.is_good:
                names[row][bump > 0.3] = NAMES.index(sprite.name)
                looks[row][bump > 0.3] = LOOKS.index(sprite.look)
    return Targets(torch.from_numpy(heat), torch.from_numpy(names), torch.from_numpy(looks))


def draw_labelled(num: int, key: Sequence[int]) -> tuple[Tensor, Targets, list[list[Labelled]]]:
    """Images (num, 3, 64, 64) with targets and labels, keyed."""
    rng = np.random.default_rng(list(key))
    drawn = [spoilt_scene(rng) for _ in range(num)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn]).transpose(0, 3, 1, 2).copy())
    labels = [found for _, found in drawn]
    return images, targets_of(labels), labels


class _Pool:
    """Images that went through the autoencoder (true ones, labelled as such) and decoded noise."""

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, seed: int) -> None:
        images, self.targets, _ = draw_labelled(POOL, [seed, 2])
        noise, deviation = torch.Generator().manual_seed(seed), 1 / float(vae.config.scaling_factor)
        recovered, noisy = [], []
        for part in images.split(64):
            latents = vae.encode(part * 2 - 1).latent_dist.mean
            eps = deviation * torch.randn(latents.shape, generator=noise)
            recovered.append(vae.decode(latents + 0.08 * eps).sample)
            level = 0.7 + 0.8 * torch.rand(len(latents), 1, 1, 1, generator=noise)
            noisy.append(vae.decode((latents + level * eps) / (1 + level**2).sqrt()).sample)
        self.recovered, self.noisy = (
            ((torch.cat(x).float() + 1) / 2).clamp(0, 1) for x in (recovered, noisy)
        )


def _changed(images: Tensor, checker: Checker, noise: torch.Generator) -> Tensor:
    """Slight changes that keep the meaning, others for each checker."""
    size = (len(images), 1, 1, 1)
    if checker.is_noised:
        images = images + torch.randn(images.shape, generator=noise) * 0.04 * torch.rand(
            size, generator=noise
        )
        return (images * (1 + 0.1 * (torch.rand(size, generator=noise) - 0.5))).clamp(0, 1)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, soft, 0.7 * torch.rand(size, generator=noise))
    return (images + 0.06 * (torch.rand(len(images), 3, 1, 1, generator=noise) - 0.5)).clamp(0, 1)


def train_checker(name: str, steps: int, out: Path, vae: AutoencoderKL) -> None:
    """Train one of `CHECKERS` for so many steps of `BATCH` images and write it as a folder."""
    checker, device = CHECKERS[name], choose_device()
    torch.manual_seed(checker.seed)
    network = NETWORKS[checker.architecture](checker.width).to(device)
    with autocast(torch.device("cpu")):
        pool = _Pool(vae.cpu().eval(), checker.seed)

    def batch(step: int) -> tuple[Tensor, Targets, Tensor]:
        noise = torch.Generator().manual_seed(checker.seed * 10**7 + step)
        images, targets, _ = draw_labelled(BATCH, [checker.seed, 3, step])
        known = torch.ones(BATCH, 2, 1, 1)
        chosen = torch.randint(0, POOL, (RECOVERED,), generator=noise)
        images[:RECOVERED] = pool.recovered[chosen]
        part = pool.targets.rows(chosen)
        targets.heat[:RECOVERED], targets.names[:RECOVERED], targets.looks[:RECOVERED] = (
            part.heat,
            part.names,
            part.looks,
        )
        noisy = slice(RECOVERED, RECOVERED + NOISY)
        images[noisy] = pool.noisy[torch.randint(0, POOL, (NOISY,), generator=noise)]
        blurred = slice(RECOVERED + NOISY, RECOVERED + NOISY + BLURRED)
        small = F.interpolate(images[blurred], scale_factor=1 / 8, mode="area")
        images[blurred] = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear")
        empty = slice(RECOVERED, RECOVERED + NOISY + BLURRED)
        targets.heat[empty], targets.names[empty], targets.looks[empty] = 0.0, -1, -1
        known[empty, 1] = 0  # whether nothing is a spoilt thing, nobody can say
        return _changed(images, checker, noise), targets, known

    def loss_of(step: int) -> Tensor:
        images, targets, known = batch(step)
        with autocast(device):
            maps = network(images.to(device)).float()
        heat = targets.heat.to(device)
        weight = (1 + 6 * heat + 6 * heat.flip(1)) * known.to(device)
        found = F.binary_cross_entropy_with_logits(maps[:, :2], heat, reduction="none") * weight
        names, looks = maps[:, 2 : 2 + len(NAMES)], maps[:, 2 + len(NAMES) :]
        return (
            4 * found.mean()
            + F.cross_entropy(names, targets.names.to(device), ignore_index=-1)
            + F.cross_entropy(looks, targets.looks.to(device), ignore_index=-1)
        )

    def snapshot() -> None:
        folder = out / name
        save_tensors(half_copy(network).state_dict(), folder / WEIGHTS)
        settings = {"architecture": checker.architecture, "width": checker.width}
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {Errors.measure(network.eval())}", flush=True)
        network.train()

    fit(
        name,
        network,
        loss_of,
        Schedule(steps, 2e-3, average=0.99),
        out / f"{name}.state.safetensors",
        snapshot,
    )


@dataclass(frozen=True)
class Errors:
    """What a checker does on images that it never saw: shares of the sprites."""

    named: float
    coloured: float
    refused: float
    invented: float

    @classmethod
    @torch.no_grad()
    def measure(cls, network: torch.nn.Module, num: int = 1000, seed: int = 7) -> Errors:
        """Measure on `num` images with spoilt sprites among the good ones."""
        images, _, labels = draw_labelled(num, [seed, 4])
        good = named = coloured = spoilt = refused = invented = 0
        findings = [each for part in images.split(100) for each in find_sprites(network, part)]
        for found, truth in zip(findings, labels, strict=True):
            there = found.there
            for sprite in truth:
                near = [s for s in there if abs(s.y - sprite.y) < 8 and abs(s.x - sprite.x) < 8]
                there = [s for s in there if s not in near]
                if sprite.is_good:
                    good += 1
                    named += bool(near) and near[0].name == sprite.name
                    coloured += bool(near) and near[0].look == sprite.look
                else:
                    spoilt += 1
                    refused += not near or any(p > SPOILT for p in found.spoilt)
            invented += len(there)
        return cls(named / good, coloured / good, refused / spoilt, invented / good)

    def __str__(self) -> str:
        return (
            f"sprites named right {self.named:.2%}, looks right {self.coloured:.2%}, "
            f"spoilt refused {self.refused:.2%}, invented {self.invented:.2%}"
        )
