"""SANA and SANA 1.5: Gemma behind an instruction, an autoencoder without a distribution, two schedulers of the same path."""

from __future__ import annotations

import string
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from diffexpo.policies.sana import pipeline_instruction
from tests.contract.family import Family
from tests.contract.transformer_families import T5_TOKENS as TOKENS
from tests.contract.transformer_families import with_settings
from tests.tiny import WIDTH

# No other width of the model: states that reach the wrong place do not fit.
TEXT_WIDTH = WIDTH - 8
SHIFT = 3.0
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
MARKS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """A tokenizer in Gemma's arrangement: padding before the text, a blank belongs to the word behind it.

    Words of the pipeline's instruction are one token each, to be quick; so its last blank becomes part of the prompt's first word, as
    with the real one. All else is about one token a character.
    """
    words = {BLANK + word for word in pipeline_instruction().lower().split()}
    merges = sorted({(word[:end], word[end]) for word in words for end in range(1, len(word))})
    characters = sorted({BLANK, "\n", *string.printable.strip()})
    tokens = dict.fromkeys([*MARKS, *characters, *("".join(pair) for pair in merges)])
    return GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, add_bos_token=True
    )


def tiny_gemma(tokenizer: GemmaTokenizer, width: int = TEXT_WIDTH) -> Gemma2Model:
    """Two layers, one of each kind of attention; fewer heads for keys than for queries."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
        )
    )


def tiny_deep_autoencoder(channels: int = 4) -> AutoencoderDC:
    """4 x 4 pixels are one latent; both kinds of blocks."""
    blocks, widths, scales = ("ResBlock", "ResBlock", "EfficientViTBlock"), (8, 16, 16), ((), (), (5,))
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def flow_solver(**changes: object) -> DPMSolverMultistepScheduler:
    """What the published checkpoints come with."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
    return DPMSolverMultistepScheduler(**settings | changes)


def build_sana(folder: Path, seed: int, *, is_solver: bool = True, **network: object) -> None:
    """Linear attention over the picture, ordinary attention to the text; 32 x 32 pixels, because the pipeline draws multiples of 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = tiny_gemma_tokenizer()
        settings = {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": TEXT_WIDTH,
            "sample_size": 8,
        }
        SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_gemma(tokenizer),
            vae=tiny_deep_autoencoder(),
            transformer=SanaTransformer2DModel(**settings | network),
            scheduler=flow_solver() if is_solver else FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        ).save_pretrained(str(folder))
    with_settings(folder, TOKENS)


def draw_sana(
    pipeline: SanaPipeline,
    prompt: str,
    latents: Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
) -> Tensor:
    """With the scheduler that `flow_euler` is, whatever solver the folder names, at the size asked for."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return pipeline(
        prompt,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        max_sequence_length=TOKENS,
        use_resolution_binning=False,
        output_type="pt",
    ).images


def latents_without_distribution(vae: AutoencoderDC, pixels: Tensor) -> Tensor:
    """The latents of pixels in [-1, 1], before scaling."""
    return vae.encode(pixels).latent


SANA = partial(
    Family, pipeline_class="SanaPipeline", draw=draw_sana, clean_latents=latents_without_distribution
)
FAMILIES = (
    SANA("sana", build_sana),
    # Normalised queries and keys; positions, as at 2048 pixels and more; two latents a patch.
    SANA(
        "sana_1_5",
        partial(
            build_sana,
            is_solver=False,
            qk_norm="rms_norm_across_heads",
            interpolation_scale=1,
            patch_size=2,
        ),
    ),
)
