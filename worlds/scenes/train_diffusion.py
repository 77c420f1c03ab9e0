"""Trains the diffusion base: text encoder and UNet together, on latents that are encoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexpo.worlds.scenes.compose import compose
from diffexpo.worlds.scenes.grammar import Scene
from worlds.emoji.fit import autocast, choose_device
from worlds.emoji.layout import save_diffusion
from worlds.emoji.models import make_ddim
from worlds.emoji.train_diffusion import TextGrounding, min_snr_weight, read_weights, shuffled, stratified
from worlds.emoji.train_vae import encode_images
from worlds.scenes.captions import caption, draw_scene
from worlds.scenes.fit import Schedule, fit
from worlds.scenes.models import make_text_encoder, make_tokenizer, make_unet

BATCH = 96
LEARNING_RATE = 8e-4
IMAGES = 100_000
GROUNDING_WEIGHT = 0.05
WORTH_COMPILING = 1000
MORE_AT_HIGH_NOISE = 4.0


def true_scenes(num: int, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """Draw training scenes: images (num, 64, 64, 3) of uint8 and what they show."""
    rng = np.random.default_rng([seed, 1])
    scenes = [draw_scene(rng) for _ in range(num)]
    return np.stack([compose(scene, rng)[0] for scene in scenes]), scenes


class LatentScenes:
    """Scaled latents of training scenes with captions drawn anew each time."""

    def __init__(self, vae: AutoencoderKL, num: int, seed: int) -> None:
        means, stds = [], []
        self.scenes: list[Scene] = []
        for part in range(-(-num // 10_000)):
            images, scenes = true_scenes(min(10_000, num - 10_000 * part), seed + 1000 * part)
            with autocast(choose_device()):
                pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
                mean, std = encode_images(vae, pixels)
            means.append(mean.half())
            stds.append(std.half())
            self.scenes += scenes
        self.means, self.stds = torch.cat(means), torch.cat(stds)
        self.scale = float(vae.config.scaling_factor)

    def draw(self, num: int, rng: np.random.Generator, noise: torch.Generator) -> tuple[Tensor, list[str]]:
        """Return latents (num, C, h, w) of unit deviation and their captions."""
        chosen = rng.integers(0, len(self.scenes), num)
        means, stds = self.means[chosen].float(), self.stds[chosen].float()
        latents = (means + stds * torch.randn(means.shape, generator=noise)) * self.scale
        return latents, [caption(self.scenes[int(i)], rng) for i in chosen]


def start_from(folder: Path, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: nn.Module) -> None:
    """Take a base's weights; words are told apart by their tokens, so that a vocabulary may have grown."""
    unet.load_state_dict(read_weights(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    weights = read_weights(folder / "text_encoder" / "model.safetensors")
    old = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    table = text_encoder.get_input_embeddings().weight.detach().clone()
    for token, row in tokenizer.get_vocab().items():
        if token in old:
            table[row] = weights[name][old[token]]
    text_encoder.load_state_dict({**weights, name: table})


def noise_weight(alpha_bar: Tensor) -> Tensor:
    """Weight (B,) of the noise-prediction error: min-SNR's, and up to four times more where noise prevails.

    min(snr, 5) / snr * clamp(snr^(-1/2), 1, 4),   snr = alpha_bar / (1 - alpha_bar)

    Where things lie is decided at high noise. There an error of the image counts in the error of the noise
    by the factor snr only, so that without the second factor relations are learned last, if at all.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return min_snr_weight(alpha_bar) * snr.rsqrt().clamp(1, MORE_AT_HIGH_NOISE)


def train_diffusion(
    steps: int,
    out: Path,
    seed: int,
    vae: AutoencoderKL,
    start: Path | None,
    num_images: int = IMAGES,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train text encoder and UNet for so many steps of `BATCH` and save the StableDiffusionPipeline folder.

    The loss is the noise-prediction error with min-SNR weights, and a small second loss that ties captions to
    latents (`TextGrounding`). The state for going on lies beside the folder, in `<out>.state.safetensors`.
    """
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer()
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    if start is not None:
        start_from(start, text_encoder, tokenizer, unet)
    text_encoder.set_attn_implementation("eager")
    unet.set_attn_processor(AttnProcessor())  # in bfloat16 on a CPU 1.6x faster than the fused kernel
    grounding = TextGrounding(text_encoder.config.hidden_size)
    parts = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet, "grounding": grounding}).to(device)
    # 1.4x faster on a CPU, after a minute of compiling.
    denoise = torch.compile(unet) if steps >= WORTH_COMPILING else unet
    data = LatentScenes(vae.to(device).eval(), num_images, seed)
    alpha_bars = make_ddim().alphas_cumprod.to(device)

    def loss_of(step: int) -> Tensor:
        rng, noise = (
            np.random.default_rng([seed, 2, step]),
            torch.Generator().manual_seed(seed * 10**7 + step),
        )
        x0, captions = data.draw(BATCH, rng, noise)
        eps = torch.randn(x0.shape, generator=noise).to(device)
        t = shuffled((stratified(BATCH, noise) * 1000).long().clamp(max=999), noise).to(device)
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ids, x0 = ids.to(device), x0.to(device)
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
        with autocast(device):
            states = text_encoder(ids).last_hidden_state
            guess = grounding(states, ids, tokenizer.eos_token_id)
            prediction = denoise(x_t, t, states).sample
        error = (prediction.float() - eps).square().mean(dim=(1, 2, 3))
        tied = (guess.float() - x0).square().mean()
        return (noise_weight(alpha_bar.flatten()) * error).mean() + GROUNDING_WEIGHT * tied

    fit(
        "diffusion",
        parts,
        loss_of,
        Schedule(steps, learning_rate),
        out.with_name(f"{out.name}.state.safetensors"),
        lambda: save_diffusion(vae, text_encoder, tokenizer, unet, out),
    )
