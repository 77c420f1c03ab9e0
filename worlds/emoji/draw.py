"""Draws images with the shipped bases through plain diffusers pipelines, one keyed seed an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw

from diffexpo.worlds.emoji import keyed_fraction
from worlds.emoji.train_flow import FoldedContextProcessor

STEPS = 20
GUIDANCE = 3.0


def load_pipeline(folder: Path) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """Return the folder's pipeline in float32, quiet."""
    flow = "StableDiffusion3Pipeline" in (folder / "model_index.json").read_text(encoding="utf-8")
    if not flow:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    else:  # diffusers wants to be told that there is no T5
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
        )
        pipeline.transformer.set_attn_processor(FoldedContextProcessor())  # the same images, 4x faster
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_images(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline,
    prompts: Sequence[str],
    keys: Sequence[str],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 64,
    absent_tokens: int = 1,
) -> np.ndarray:
    """Return uint8 images (N, 64, 64, 3) of the prompts.

    Args:
        prompts: N texts.
        keys: N names; an image's noise depends on its own key alone.
        steps: network evaluations with guidance count twice.
        guidance: scale of classifier-free guidance; 1 switches it off.
        absent_tokens: tokens of the absent T5 that a flow base is told; 1 where all are folded in one.
    """
    flow = isinstance(pipeline, StableDiffusion3Pipeline)
    images = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [
            torch.Generator().manual_seed(int(keyed_fraction("picture", key) * 2**53))
            for key in keys[start : start + batch]
        ]
        if flow:
            output = pipeline(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
                max_sequence_length=absent_tokens,
            )
        else:
            output = pipeline(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
            )
        images.append((output.images * 255).round().clip(0, 255).astype(np.uint8))
    return np.concatenate(images)


def to_float(images: np.ndarray) -> torch.Tensor:
    """Return (N, 3, H, W) float32 in [0, 1] from uint8 (N, H, W, 3)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def draw_grid(images: np.ndarray, titles: Sequence[str], columns: int, scale: int = 2) -> Image.Image:
    """Return a sheet of uint8 images (N, H, W, 3), enlarged, with a title under each."""
    size = images.shape[1] * scale
    height = size + 16
    rows = (len(images) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (size + 8), rows * (height + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = (index % columns) * (size + 8) + 4, (index // columns) * (height + 8) + 4
        sheet.paste(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS), (x, y))
        plain = title.replace("\u2019", "'").encode("ascii", "replace").decode()  # the font is ASCII only
        longest = size // 6
        pen.text(
            (x, y + size + 2), plain if len(plain) <= longest else plain[: longest - 2] + "..", fill="black"
        )
    return sheet
