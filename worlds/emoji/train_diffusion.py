"""Trains the diffusion base: text encoder and UNet together, on precomputed latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from diffexpo.worlds.emoji import load_images, load_rows
from worlds.emoji.attributes import is_train
from worlds.emoji.captions import CaptionedDraws
from worlds.emoji.fit import Average, Schedule, autocast, choose_device, fit
from worlds.emoji.layout import save_diffusion
from worlds.emoji.models import LATENT_CHANNELS, LATENT_SIZE, make_ddim, make_text_encoder, make_unet
from worlds.emoji.tokens import make_tokenizer
from worlds.emoji.train_vae import encode_images

BATCH = 128
LEARNING_RATE = 1e-3
MIN_SNR_GAMMA = 5.0
GROUNDING_SHARE = 0.15
GROUNDING_WEIGHT = 0.05


class LatentDraws:
    """Draws scaled latents with captions from the train split; the images are encoded once."""

    def __init__(self, vae: AutoencoderKL, seed: int) -> None:
        self.draws = np.random.default_rng([seed, 2])
        self.generator = torch.Generator().manual_seed(seed + 29)
        rows = [row for row in load_rows() if is_train(row)]
        self.captions = CaptionedDraws(rows)
        self.means, self.stds = encode_images(vae, load_images([row["id"] for row in rows]))
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


class TextGrounding(nn.Module):
    """Predicts the mean clean latents of a caption from its last text states, so that rare words soon mean
    something.

    Through the denoiser alone a word that is drawn fifty times hardly reaches the text encoder; this direct
    regression does it at a tenth of the cost. It is used in training only and not saved.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(width, 384), nn.GELU(), nn.Linear(384, LATENT_CHANNELS * LATENT_SIZE**2)
        )

    def forward(self, states: Tensor, ids: Tensor, end: int) -> Tensor:
        """Return (B, C, h, w) from text states (B, L, D); the mean over the end token and the padding is
        read."""
        last = (ids == end).to(states.dtype).unsqueeze(-1)
        pooled = (states * last).sum(dim=1) / last.sum(dim=1)
        return self.head(pooled).unflatten(-1, (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a safetensors file's tensors in float32."""
    return {name: value.float() for name, value in load_file(path).items()}


def stratified(num: int, generator: torch.Generator) -> Tensor:
    """Return one number in each of `num` equal slices of [0, 1), in order, which lowers the variance of a
    loss."""
    return (torch.arange(num) + torch.rand(num, generator=generator)) / num


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return the values in random order."""
    return values[torch.randperm(len(values), generator=generator)]


def fit_grounded(
    name: str,
    losses: tuple[Callable[[float], Tensor], Callable[[float], Tensor]],
    parts: nn.ModuleDict,
    minutes: float,
    *,
    is_continued: bool,
    snapshot: Callable[[], None],
    warmup: float = 0.02,
) -> None:
    """Train the text encoders alone on the grounding loss, then everything on the whole loss.

    Args:
        losses: the grounding loss and the whole loss, each called with the progress. parts: "text", which
        holds the text encoders and the head "grounding", and the denoiser. is_continued: the weights come
        from a folder: only the head, which is not stored, is learned from scratch,
            quickly, and the rate is 0.6 of the usual one.
    """
    alone = 0.04 if is_continued else GROUNDING_SHARE
    first = parts["text"]["grounding"] if is_continued else parts["text"]
    rate = LEARNING_RATE * (0.6 if is_continued else 1.0)
    fit(f"{name} text", losses[0], first.parameters(), Schedule(minutes * alone, 1.5e-3, final=0.3))
    fit(
        name,
        losses[1],
        parts.parameters(),
        Schedule(minutes * (1 - alone), rate, warmup=warmup),
        averages=[Average(parts, 0.999)],
        snapshot=snapshot,
    )


def train_diffusion(
    minutes: float, out: Path, seed: int, vae: AutoencoderKL, start: Path | None = None
) -> None:
    """Train text encoder and UNet and save the StableDiffusionPipeline folder to `out`, every 8 minutes too.

    The first GROUNDING_SHARE of the time goes to the text encoder alone (see `TextGrounding`); then both
    learn the noise together, with the grounding as a small second loss. With `start` both continue from the
    weights in that folder at 0.6 of the learning rate.
    """
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer() if start is None else CLIPTokenizer.from_pretrained(start / "tokenizer")
    data = LatentDraws(vae, seed)
    text_encoder, unet = make_text_encoder(tokenizer).to(device), make_unet().to(device)
    if start is not None:
        text_encoder.load_state_dict(read_weights(start / "text_encoder" / "model.safetensors"))
        unet.load_state_dict(read_weights(start / "unet" / "diffusion_pytorch_model.safetensors"))
    text_encoder.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU 1.6x faster than the fused kernel
    grounding = TextGrounding(text_encoder.config.hidden_size).to(device)
    text = nn.ModuleDict({"text_encoder": text_encoder, "grounding": grounding})
    alpha_bars = make_ddim().alphas_cumprod.to(device)

    def encode(captions: list[str], x0: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(device)
        with autocast(device):
            states = text_encoder(ids).last_hidden_state
            guess = grounding(states, ids, tokenizer.eos_token_id)
        return states, (guess.float() - x0.to(device)).square().mean()

    def grounding_loss(progress: float) -> Tensor:
        x0, captions = data.draw(BATCH)
        return encode(captions, x0)[1]

    def loss_of(progress: float) -> Tensor:
        x0, captions = data.draw(BATCH)
        eps = data.noise_like(x0)
        times = (stratified(BATCH, data.generator) * 1000).long().clamp(max=999)
        t = shuffled(times, data.generator).to(device)
        states, grounding_error = encode(captions, x0)
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0.to(device) + (1 - alpha_bar).sqrt() * eps.to(device)
        with autocast(device):
            prediction = unet(x_t, t, states).sample
        error = (prediction.float() - eps.to(device)).square().mean(dim=(1, 2, 3))
        return (min_snr_weight(alpha_bar.flatten()) * error).mean() + GROUNDING_WEIGHT * grounding_error

    fit_grounded(
        "diffusion",
        (grounding_loss, loss_of),
        nn.ModuleDict({"text": text, "unet": unet}),
        minutes,
        is_continued=start is not None,
        snapshot=lambda: save_diffusion(vae, text_encoder, tokenizer, unet, out),
    )
