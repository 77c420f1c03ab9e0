"""Transformer families: Stable Diffusion 3 with and without T5, 3.5, FLUX.1 dev and schnell, PixArt-Sigma."""

from __future__ import annotations

import json
import string
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffexpo.config.families import flux
from tests.contract.family import Family
from tests.tiny import WIDTH, _text_config, _vae, tiny_tokenizer

# Tokens of T5: fewer than any pipeline's default, to be quick. The folders say so in diffexpo.json.
T5_TOKENS = 20


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """A Unigram tokenizer in T5's arrangement: about one token a character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_letters + string.digits + ".,'-"]
    pieces += [("\N{LOWER ONE EIGHTH BLOCK}a", -3.5), ("at", -4.0)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_t5(tokenizer: T5TokenizerFast, width: int) -> T5EncoderModel:
    """Two layers with gated feed-forward, as T5 v1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=8,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def with_settings(folder: Path, tokens: int = T5_TOKENS) -> None:
    """Write what the model was trained with beside model_index.json."""
    (folder / "diffexpo.json").write_text(json.dumps({"max_sequence_length": tokens}))


def build_sd3(folder: Path, seed: int, *, has_t5: bool = False, **network: object) -> None:
    """Two CLIP encoders of different width, shift 3, three blocks."""
    second = WIDTH // 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
        narrow = _text_config(clip, second)
        narrow.hidden_size, narrow.intermediate_size = second, 2 * second
        settings = {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 2 * WIDTH,
            "caption_projection_dim": 32,
            "pooled_projection_dim": WIDTH + second,
            "pos_embed_max_size": 8,
        }
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**settings | network),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(4, 0.1),
            text_encoder=CLIPTextModelWithProjection(_text_config(clip)),
            tokenizer=clip,
            text_encoder_2=CLIPTextModelWithProjection(narrow),
            tokenizer_2=clip,
            text_encoder_3=tiny_t5(t5, 2 * WIDTH) if has_t5 else None,
            tokenizer_3=t5 if has_t5 else None,
        ).save_pretrained(str(folder))
    with_settings(folder)


def build_flux(folder: Path, seed: int, *, is_distilled: bool) -> None:
    """One block of two streams, two of one. dev: guidance is fed to the network, the shift follows from the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, t5 = tiny_tokenizer(), tiny_t5_tokenizer()
        schedule = {"use_dynamic_shifting": True, "shift": 3.0} if is_distilled else {"shift": 1.0}
        FluxPipeline(
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=is_distilled,
                axes_dims_rope=(4, 6, 6),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
            vae=_vae(4, 0.1),
            text_encoder=CLIPTextModel(_text_config(clip)),
            tokenizer=clip,
            text_encoder_2=tiny_t5(t5, WIDTH),
            tokenizer_2=t5,
        ).save_pretrained(str(folder))
    with_settings(folder)


def build_pixart(folder: Path, seed: int, **network: object) -> None:
    """Cross-attention to T5, a learned variance, the linear schedule of the checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        t5 = tiny_t5_tokenizer()
        settings = {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "caption_channels": WIDTH,
            "sample_size": 8,
            "patch_size": 2,
        }
        PixArtSigmaPipeline(
            tokenizer=t5,
            text_encoder=tiny_t5(t5, WIDTH),
            vae=_vae(4, None),
            transformer=PixArtTransformer2DModel(**settings | network),
            scheduler=DDIMScheduler(
                beta_start=0.0001,
                beta_end=0.02,
                beta_schedule="linear",
                clip_sample=False,
                set_alpha_to_one=False,
            ),
        ).save_pretrained(str(folder))
    with_settings(folder)


def draw_with_t5(
    pipeline: DiffusionPipeline,
    prompt: str,
    latents: Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
) -> Tensor:
    """The images of a pipeline that reads so few tokens."""
    return pipeline(
        prompt,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        max_sequence_length=T5_TOKENS,
        output_type="pt",
    ).images


def draw_flux(
    pipeline: FluxPipeline, prompt: str, latents: Tensor, steps: int, guidance: float, size: tuple[int, int]
) -> Tensor:
    """FLUX takes packed latents; its `guidance_scale` is the number fed to the network, at its default here."""
    assert guidance == 1.0
    return pipeline(
        prompt,
        latents=pipeline._pack_latents(latents, *latents.shape),
        num_inference_steps=steps,
        height=size[0],
        width=size[1],
        max_sequence_length=T5_TOKENS,
        output_type="pt",
    ).images


def unpack_flux(tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Tokens (B, n, 4C) of the network as latents (B,C,h,w)."""
    return FluxPipeline._unpack_latents(tokens, *shape[1:], vae_scale_factor=1)


def draw_pixart(
    pipeline: PixArtSigmaPipeline,
    prompt: str,
    latents: Tensor,
    steps: int,
    guidance: float,
    size: tuple[int, int],
) -> Tensor:
    """As drawn from prepared prompts, at the size asked for."""
    return pipeline(
        prompt,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        max_sequence_length=T5_TOKENS,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    ).images


SD3 = partial(Family, pipeline_class="StableDiffusion3Pipeline", draw=draw_with_t5)
# Classifier-free guidance is off, as in the pipeline: with it every step is two calls of the network.
FLUX = partial(
    Family,
    pipeline_class="FluxPipeline",
    lora_targets=flux.CARD.lora_targets,
    guidance=1.0,
    draw=draw_flux,
    unpack=unpack_flux,
)
FAMILIES = (
    SD3("sd3", build_sd3),
    SD3("sd3_t5", partial(build_sd3, has_t5=True)),
    SD3("sd3_5", partial(build_sd3, has_t5=True, qk_norm="rms_norm", dual_attention_layers=(0,))),
    FLUX("flux_dev", partial(build_flux, is_distilled=True)),
    FLUX("flux_schnell", partial(build_flux, is_distilled=False)),
    Family("pixart_sigma", build_pixart, "PixArtSigmaPipeline", draw=draw_pixart),
)
