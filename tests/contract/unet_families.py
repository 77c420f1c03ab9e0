"""UNet families: Stable Diffusion 1.x, 2.x with v-prediction (also down to zero signal), XL."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from tests.contract.family import Family
from tests.tiny import MAX_TOKENS, WIDTH, _vae, tiny_diffusion, tiny_tokenizer

# Files of Stable Diffusion 2 pad with "!", those of 1 with the end mark.
PAD = "!"


def text_config(tokenizer: CLIPTokenizer, activation: str, width: int = WIDTH) -> CLIPTextConfig:
    """Three layers: the penultimate states are not the last ones."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def padded_with(pad: str) -> CLIPTokenizer:
    """The tiny tokenizer with another padding token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    return tokenizer


def scheduler(**changes: object) -> DDIMScheduler:
    """Stable Diffusion's schedule."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**settings | changes)


def tiny_unet(text_width: int, **changes: object) -> UNet2DConditionModel:
    """One block without and one with attention: latents (4, 8, 8)."""
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": text_width,
        # Stable Diffusion 2 and XL: one number of heads for each block, linear projections around attention.
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**settings | changes)


def build_sd15(folder: Path, seed: int) -> None:
    """eps, CLIP, the last hidden states."""
    tiny_diffusion(folder, seed=seed)


def build_sd2(folder: Path, seed: int, **schedule: object) -> None:
    """v, a text encoder with GELU, padding with "!"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = padded_with(PAD)
        StableDiffusionPipeline(
            vae=_vae(4, None),
            text_encoder=CLIPTextModel(text_config(tokenizer, "gelu")),
            tokenizer=tokenizer,
            unet=tiny_unet(WIDTH),
            scheduler=scheduler(prediction_type="v_prediction", **schedule),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(str(folder))


def build_sdxl(folder: Path, seed: int) -> None:
    """eps, two text encoders of different width and padding, pooled text and picture size."""
    pooled = WIDTH // 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizers = tiny_tokenizer(), padded_with(PAD)
        StableDiffusionXLPipeline(
            vae=_vae(4, None),
            text_encoder=CLIPTextModel(text_config(tokenizers[0], "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizers[1], "gelu", pooled)),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=tiny_unet(
                WIDTH + pooled,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=pooled + 6 * 8,
            ),
            scheduler=scheduler(),
        ).save_pretrained(str(folder))


FAMILIES = (
    Family("sd15", build_sd15, "StableDiffusionPipeline"),
    Family("sd2_v", build_sd2, "StableDiffusionPipeline"),
    Family(
        "sd2_zero_snr",
        partial(build_sd2, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        "StableDiffusionPipeline",
    ),
    Family("sdxl", build_sdxl, "StableDiffusionXLPipeline"),
)
