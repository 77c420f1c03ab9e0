"""Trains the autoencoder on the train images of both styles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from diffexpo.worlds.emoji import load_images, load_rows
from worlds.emoji.attributes import is_train
from worlds.emoji.fit import Average, Schedule, autocast, choose_device, fit
from worlds.emoji.models import make_vae

KL_WEIGHT = 1e-5
BATCH = 16


def edge_loss(image: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of horizontal and vertical differences: it keeps outlines sharp."""
    across = (image.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    down = (image.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    return across + down


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of images in [0, 1], unscaled, float32 on the
    CPU."""
    device = next(vae.parameters()).device
    means, stds = [], []
    for start in range(0, len(images), batch):
        part = torch.from_numpy(images[start : start + batch]).to(device) * 2 - 1
        posterior = vae.encode(part).latent_dist
        means.append(posterior.mean.float().cpu())
        stds.append(posterior.std.float().cpu())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, batch: int = 64) -> Tensor:
    """Return images in [0, 1] from unscaled latents."""
    device = next(vae.parameters()).device
    parts = [
        vae.decode(latents[i : i + batch].to(device)).sample.float().cpu()
        for i in range(0, len(latents), batch)
    ]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def reconstruction_psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Return the mean over images of 10 log10(1 / mean squared error), in dB."""
    means, _ = encode_images(vae, images)
    errors = (decode_latents(vae, means) - torch.from_numpy(images)).square().mean(dim=(1, 2, 3))
    return float((-10 * errors.clamp_min(1e-9).log10()).mean())


def reconstruction_loss(recovered: Tensor, x: Tensor) -> Tensor:
    """Return the distance that the autoencoder minimises: squared, absolute and of the outlines."""
    return F.mse_loss(recovered, x) * 4 + F.l1_loss(recovered, x) + 0.5 * edge_loss(recovered, x)


class _ImageDraws:
    """Draws uint8 train images without repetition inside an epoch."""

    def __init__(self, seed: int) -> None:
        rows = load_rows()
        self.seen = load_images([row["id"] for row in rows if is_train(row)])
        self.unseen = load_images([row["id"] for row in rows if row["split_concept"] == "heldout"])
        self._images = torch.from_numpy(np.rint(self.seen * 255).astype(np.uint8))
        self._draw = np.random.default_rng(seed)
        self._order: list[int] = []

    def draw(self) -> Tensor:
        """Return BATCH images in [-1, 1]."""
        if len(self._order) < BATCH:
            self._order.extend(self._draw.permutation(len(self._images)).tolist())
        return self._images[[self._order.pop() for _ in range(BATCH)]].float() / 127.5 - 1

    def report(self, vae: AutoencoderKL) -> str:
        """Return a line with the PSNR on held-out and on seen images."""
        return (
            f"held-out PSNR {reconstruction_psnr(vae, self.unseen):.2f} dB, "
            f"seen {reconstruction_psnr(vae, self.seen[::31]):.2f} dB"
        )


def train_vae(minutes: float, out: Path, seed: int) -> None:
    """Train the autoencoder and save it to `out` with the scaling factor that gives latents unit
    deviation."""
    torch.manual_seed(seed)
    device = choose_device()
    images = _ImageDraws(seed)
    vae = make_vae().to(device)

    def loss_of(progress: float) -> Tensor:
        x = images.draw().to(device)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            recovered = vae.decode(posterior.sample()).sample
        return reconstruction_loss(recovered.float(), x) + KL_WEIGHT * posterior.kl().mean()

    def snapshot() -> None:
        vae.eval()
        means, stds = encode_images(vae, images.seen[::7])
        vae.register_to_config(scaling_factor=1 / float((means.var() + stds.square().mean()).sqrt()))
        print(
            f"vae: {images.report(vae)}, scaling factor {vae.config.scaling_factor:.4f}, "
            f"latent noise {float(stds.mean()):.3f}",
            flush=True,
        )
        vae.save_pretrained(out)
        vae.train()

    fit(
        "vae",
        loss_of,
        vae.parameters(),
        Schedule(minutes, 2e-3),
        averages=[Average(vae, 0.998)],
        snapshot=snapshot,
        snapshot_minutes=3.0,
    )


def train_decoder(minutes: float, out: Path, seed: int, vae: AutoencoderKL) -> None:
    """Train the decoder of a finished autoencoder further and save the whole to `out`.

    The encoder stays as it is, so latents, and the denoisers trained on them, keep their meaning.
    """
    torch.manual_seed(seed)
    device = choose_device()
    images = _ImageDraws(seed + 1)
    vae = vae.to(device)
    vae.requires_grad_(False)
    learned = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    print(f"decoder: before, {images.report(vae)}", flush=True)

    def loss_of(progress: float) -> Tensor:
        x = images.draw().to(device)
        with autocast(device):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.sample()
            recovered = vae.decode(latents).sample
        return reconstruction_loss(recovered.float(), x)

    def snapshot() -> None:
        print(f"decoder: {images.report(vae)}", flush=True)
        vae.save_pretrained(out)

    fit(
        "decoder",
        loss_of,
        learned.parameters(),
        Schedule(minutes, 1e-3),
        averages=[Average(learned, 0.998)],
        snapshot=snapshot,
        snapshot_minutes=5.0,
    )
