"""What a diffusion base's prediction does with a caption at high noise: that is where scenes are decided."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from worlds.emoji.train_vae import encode_images
from worlds.scenes.train_diffusion import ExchangedScenes, true_scenes

LEVELS = (999, 900, 800, 700, 500)


@torch.no_grad()
def clean_prediction(
    pipeline: StableDiffusionPipeline, x_t: Tensor, level: int, captions: Sequence[str]
) -> Tensor:
    """x0_hat (B,C,h,w) of a base that predicts v or the noise."""
    ids = pipeline.tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    said = pipeline.unet(x_t, level, pipeline.text_encoder(ids).last_hidden_state).sample
    alpha, sigma = scales(pipeline, level)
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        return alpha * x_t - sigma * said
    return (x_t - sigma * said) / alpha


def scales(pipeline: StableDiffusionPipeline, level: int) -> tuple[Tensor, Tensor]:
    """alpha and sigma of a timestep."""
    alpha_bar = pipeline.scheduler.alphas_cumprod[level]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def order_response(pipeline: StableDiffusionPipeline, num: int = 64) -> float:
    """How much a base's first guess depends on which of two things is where.

    sum(d_hat d) / sum(d d), d = x0_1 - x0_2 of `ExchangedScenes`, d_hat the difference of the clean latents
    that are predicted from the same pure noise for both captions. 0 for a model that takes "left of" for
    "right of"; 1 would need a model that knows where exactly both things will be.
    """
    x0, captions = ExchangedScenes(pipeline.vae, num, seed=12).draw(num, np.random.default_rng(12))
    noise = torch.randn(num, *x0.shape[1:], generator=torch.Generator().manual_seed(12)).repeat(2, 1, 1, 1)
    guesses = clean_prediction(pipeline, noise, LEVELS[0], captions)
    (first, second), (guess, other) = x0.chunk(2), guesses.chunk(2)
    truth = first - second
    return float(((guess - other) * truth).sum() / truth.square().sum())


def caption_scales(
    pipeline: StableDiffusionPipeline, num: int = 192, levels: Sequence[int] = LEVELS
) -> dict[str, float]:
    """By timestep, how much of what a caption changes of a base's prediction is true.

    sum(d (x0 - u)) / sum(d d), d = c - u, with c and u the clean latents that are predicted with a scene's
    true caption and with the empty one: 1 for a base that says no more than it knows, 1/2 for one that draws
    without guidance as if it had been guided at 2. More guidance at these times makes the latter worse.
    """
    images, scenes = true_scenes(num, seed=999)
    means, _ = encode_images(pipeline.vae, images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    x0 = means.float() * float(pipeline.vae.config.scaling_factor)
    found = {}
    for level in levels:
        alpha, sigma = scales(pipeline, level)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(level))
        x_t = alpha * x0 + sigma * noise
        c = clean_prediction(pipeline, x_t, level, [scene.text for scene in scenes])
        u = clean_prediction(pipeline, x_t, level, [""] * num)
        found[str(level)] = float(((c - u) * (x0 - u)).sum() / (c - u).square().sum())
    return found
