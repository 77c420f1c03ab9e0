"""Trains the decoder of a finished autoencoder further on scenes; latents keep their meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from worlds.emoji.fit import autocast, choose_device
from worlds.emoji.train_vae import reconstruction_loss, reconstruction_psnr
from worlds.scenes.fit import Schedule, fit
from worlds.scenes.train_diffusion import true_scenes

BATCH = 24
IMAGES = 20_000
LATENT_NOISE = 0.3
"""Largest deviation of the noise on latents, in units of theirs: a denoiser leaves some behind, and the
decoder learns to draw whole sprites all the same."""


def train_decoder(steps: int, out: Path, seed: int, vae: AutoencoderKL) -> None:
    """Train the decoder for so many steps of `BATCH` true scenes and save the autoencoder to `out`."""
    torch.manual_seed(seed)
    device = choose_device()
    images, _ = true_scenes(IMAGES, seed + 5)
    unseen = true_scenes(256, seed + 6)[0].transpose(0, 3, 1, 2).astype(np.float32) / 255
    vae = vae.to(device).requires_grad_(False)
    learned = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    deviation = 1 / float(vae.config.scaling_factor)
    print(f"decoder: before, {reconstruction_psnr(vae, unseen):.2f} dB", flush=True)

    def loss_of(step: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed * 10**7 + step)
        chosen = torch.randint(0, len(images), (BATCH,), generator=noise)
        x = torch.from_numpy(images[chosen.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x.to(device)
        with autocast(device):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.mean.float()
            level = LATENT_NOISE * deviation * torch.rand(BATCH, 1, 1, 1, generator=noise)
            shifted = latents + (level * torch.randn(latents.shape, generator=noise)).to(device)
            recovered = vae.decode(shifted).sample
        return reconstruction_loss(recovered.float(), x)

    def snapshot() -> None:
        print(f"decoder: {reconstruction_psnr(vae, unseen):.2f} dB", flush=True)
        vae.save_pretrained(out)

    fit(
        "decoder",
        learned,
        loss_of,
        Schedule(steps, 1e-3),
        out.with_name(f"{out.name}.state.safetensors"),
        snapshot,
    )
