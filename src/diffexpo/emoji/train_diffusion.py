"""Trains the diffusion base: text encoder and UNet together, on precomputed latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from diffexpo.emoji.captions import CaptionedDraws
from diffexpo.emoji.dataset import is_train, load_images, load_rows
from diffexpo.emoji.fit import Average, autocast, choose_device, fit
from diffexpo.emoji.layout import save_diffusion
from diffexpo.emoji.models import make_ddim, make_text_encoder, make_unet
from diffexpo.emoji.tokens import make_tokenizer
from diffexpo.emoji.train_vae import encode_pictures

BATCH = 128
LEARNING_RATE = 1e-3
MIN_SNR_GAMMA = 5.0


class LatentDraws:
    """Draws scaled latents with captions from the train split; the pictures are encoded once."""

    def __init__(self, vae: AutoencoderKL, seed: int) -> None:
        self.draws = np.random.default_rng([seed, 2])
        self.generator = torch.Generator().manual_seed(seed + 29)
        rows = [row for row in load_rows() if is_train(row)]
        self.captions = CaptionedDraws(rows)
        self.means, self.stds = encode_pictures(vae, load_images([row["id"] for row in rows]))
        self.scale = float(vae.config.scaling_factor)

    def draw(self, num: int) -> tuple[Tensor, list[str]]:
        """Return latents (num, C, h, w) of unit deviation and their captions."""
        indices, captions = self.captions.draw(self.draws, num)
        noise = torch.randn((num, *self.means.shape[1:]), generator=self.generator)
        return (self.means[indices] + self.stds[indices] * noise) * self.scale, captions

    def noise_like(self, latents: Tensor) -> Tensor:
        """Return Gaussian noise from this sampler's own generator."""
        return torch.randn(latents.shape, generator=self.generator)


def min_snr_weight(alpha_bar: Tensor, gamma: float = MIN_SNR_GAMMA) -> Tensor:
    """Return min(SNR, gamma) / SNR, the weight of a noise-prediction error (Hang et al. 2023, eq. 7)."""
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / snr


def train_diffusion(minutes: float, out: Path, seed: int, vae: AutoencoderKL, snapshot_minutes: float = 8.0) -> None:
    """Train text encoder and UNet from scratch and save the StableDiffusionPipeline folder to `out`, now and then too."""
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer()
    data = LatentDraws(vae, seed)
    text_encoder = make_text_encoder(tokenizer).to(device)
    text_encoder.set_attn_implementation("eager")
    unet = make_unet().to(device)
    unet.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU 1.6x faster than the fused kernel
    modules = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    average = Average(modules, 0.999)
    alpha_bars = make_ddim().alphas_cumprod.to(device)

    def loss_of(progress: float) -> Tensor:
        x0, captions = data.draw(BATCH)
        eps = data.noise_like(x0)
        # Stratified times: one in each of BATCH equal slices, which lowers the variance of the loss.
        slices = (torch.arange(BATCH) + torch.rand(BATCH, generator=data.generator)) / BATCH
        t = (slices * 1000).long().clamp(max=999)[torch.randperm(BATCH, generator=data.generator)].to(device)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0.to(device) + (1 - alpha_bar).sqrt() * eps.to(device)
        with autocast(device):
            states = text_encoder(tokens.input_ids.to(device)).last_hidden_state
            prediction = unet(x_t, t, states).sample
        error = (prediction.float() - eps.to(device)).square().mean(dim=(1, 2, 3))
        return (min_snr_weight(alpha_bar.flatten()) * error).mean()

    def snapshot() -> None:
        save_diffusion(vae, text_encoder, tokenizer, unet, out)

    fit("diffusion", loss_of, modules.parameters(), minutes=minutes, learning_rate=LEARNING_RATE, averages=[average],
        snapshot=snapshot, snapshot_minutes=snapshot_minutes)
