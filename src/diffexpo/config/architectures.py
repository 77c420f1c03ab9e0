"""The public settings of well-known base models: enough to count their weights without having them. Imports
without torch.

Each entry holds the settings of the published `config.json` files that decide sizes; everything else is the
class's default. A fine-tuned model has the architecture, and mostly the licence, of the model that it began
as.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Settings = Mapping[str, object]


@dataclass(frozen=True)
class Architecture:
    """One base model. `components` maps a component to (class, settings); `parameters` is the denoiser's
    published count.

    `pattern` recognises hub ids and folder names; `licence` is the hub's identifier, or the name of a licence
    of its own.
    """

    name: str
    pipeline: str
    pattern: str
    parameters: int
    licence: str
    components: Mapping[str, tuple[str, Settings]] = field(repr=False)


_CLIP_L: Settings = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_CLIP_BIG_G: Settings = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_CLIP_H: Settings = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
_T5_XXL: Settings = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_VAE: Settings = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_VAE_16: Settings = {
    **_VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD_UNET: Settings = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD3: Settings = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_SD3_TEXTS: Mapping[str, tuple[str, Settings]] = {
    "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG_G),
    "text_encoder_3": ("T5EncoderModel", _T5_XXL),
}
_FLUX: Settings = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
_FLUX_TEXTS: Mapping[str, tuple[str, Settings]] = {
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "text_encoder_2": ("T5EncoderModel", _T5_XXL),
}

_GEMMA_2B: Settings = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_DC_AE: Settings = {
    "latent_channels": 32,
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3] * 6,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}
_SANA: Settings = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "attention_head_dim": 32,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
}
_SANA_SMALL: Settings = {
    **_SANA,
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


def _sana(name: str, pattern: str, parameters: int, settings: Settings) -> Architecture:
    """A SANA of that size, which is told by its name; the distilled ones (Sprint) have another pipeline."""
    return Architecture(
        name=name,
        pipeline="SanaPipeline",
        pattern=rf"^(?!.*sprint).*{pattern}",
        parameters=parameters,
        licence="NVIDIA License, Gemma Terms of Use",
        components={
            "text_encoder": ("Gemma2Model", _GEMMA_2B),
            "transformer": ("SanaTransformer2DModel", settings),
            "vae": ("AutoencoderDC", _DC_AE),
        },
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    _sana(
        "sana15-4800m",
        r"sana.?1.?5.*4\.?8",
        4_721_825_952,
        {**_SANA, "num_layers": 60, "qk_norm": "rms_norm_across_heads"},
    ),
    _sana(
        "sana15-1600m",
        r"sana.?1.?5.*1\.?6",
        1_604_641_952,
        {**_SANA, "qk_norm": "rms_norm_across_heads"},
    ),
    _sana("sana-1600m", r"sana.*1(\.6b|600m)", 1_604_462_752, _SANA),
    _sana("sana-600m", r"sana.*(0\.6b|600m)", 591_747_872, _SANA_SMALL),
    Architecture(
        name="flux1-schnell",
        pipeline="FluxPipeline",
        pattern=r"flux.*schnell",
        parameters=11_891_178_560,
        licence="apache-2.0",
        components={
            **_FLUX_TEXTS,
            "transformer": ("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": False}),
            "vae": ("AutoencoderKL", _VAE_16),
        },
    ),
    Architecture(
        name="flux1-dev",
        pipeline="FluxPipeline",
        pattern=r"flux",
        parameters=11_901_408_320,
        licence="FLUX.1 [dev] Non-Commercial License",
        components={
            **_FLUX_TEXTS,
            "transformer": ("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": True}),
            "vae": ("AutoencoderKL", _VAE_16),
        },
    ),
    Architecture(
        name="pixart-sigma",
        pipeline="PixArtSigmaPipeline",
        pattern=r"pixart.*sigma",
        parameters=610_856_096,
        licence="openrail++",
        components={
            "text_encoder": ("T5EncoderModel", _T5_XXL),
            "transformer": (
                "PixArtTransformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 4,
                    "out_channels": 8,
                    "num_layers": 28,
                    "attention_head_dim": 72,
                    "num_attention_heads": 16,
                    "cross_attention_dim": 1152,
                    "caption_channels": 4096,
                    "use_additional_conditions": False,
                },
            ),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 1024}),
        },
    ),
    Architecture(
        name="sd35-medium",
        pipeline="StableDiffusion3Pipeline",
        pattern=r"(stable-diffusion-|sd-?)3[.-]?5.*medium",
        parameters=2_243_171_520,
        licence="Stability AI Community License",
        components={
            **_SD3_TEXTS,
            "transformer": (
                "SD3Transformer2DModel",
                {
                    **_SD3,
                    "pos_embed_max_size": 384,
                    "qk_norm": "rms_norm",
                    "dual_attention_layers": list(range(13)),
                },
            ),
            "vae": ("AutoencoderKL", _VAE_16),
        },
    ),
    Architecture(
        name="sd3-medium",
        pipeline="StableDiffusion3Pipeline",
        pattern=r"(stable-diffusion-|sd-?)3(?![.-]?5)",
        parameters=2_028_328_000,
        licence="Stability AI Community License",
        components={
            **_SD3_TEXTS,
            "transformer": ("SD3Transformer2DModel", _SD3),
            "vae": ("AutoencoderKL", _VAE_16),
        },
    ),
    Architecture(
        name="sdxl",
        pipeline="StableDiffusionXLPipeline",
        pattern=r"sdxl|stable-diffusion-xl",
        parameters=2_567_463_684,
        licence="openrail++",
        components={
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG_G),
            "unet": (
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "block_out_channels": [320, 640, 1280],
                    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "layers_per_block": 2,
                    "transformer_layers_per_block": [1, 2, 10],
                    "attention_head_dim": [5, 10, 20],
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 1024}),
        },
    ),
    Architecture(
        name="sd21",
        pipeline="StableDiffusionPipeline",
        pattern=r"(stable-diffusion-|sd-?)(v?2)",
        parameters=865_910_724,
        licence="openrail++",
        components={
            "text_encoder": ("CLIPTextModel", _CLIP_H),
            "unet": (
                "UNet2DConditionModel",
                {
                    **_SD_UNET,
                    "sample_size": 96,
                    "attention_head_dim": [5, 10, 20, 20],
                    "cross_attention_dim": 1024,
                    "use_linear_projection": True,
                },
            ),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 768}),
        },
    ),
    Architecture(
        name="sd15",
        pipeline="StableDiffusionPipeline",
        pattern=r"(stable-diffusion-|sd-?)(v?1)",
        parameters=859_520_964,
        licence="creativeml-openrail-m",
        components={
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "unet": ("UNet2DConditionModel", _SD_UNET),
            "vae": ("AutoencoderKL", _VAE),
        },
    ),
)
"""The first whose pattern is found in a model's name is taken, so the narrower patterns stand first."""


def find_architecture(name: str) -> Architecture | None:
    """The architecture of a model by its hub id or folder name, or by its name in `ARCHITECTURES`.

    Args:
        name: For example `stabilityai/stable-diffusion-xl-base-1.0`, or `sdxl`.
    Returns:
        The entry, or None; `find_architecture("runwayml/stable-diffusion-v1-5").name` is "sd15".
    """
    wanted = name.lower()
    exact = [known for known in ARCHITECTURES if known.name == wanted]
    found = exact or [known for known in ARCHITECTURES if re.search(known.pattern, wanted)]
    return found[0] if found else None
