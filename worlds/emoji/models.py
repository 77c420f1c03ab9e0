"""The shapes of the emoji models: plain diffusers and transformers configurations, a few million parameters
each."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

IMAGE_SIZE = 64
LATENT_SIZE = 8
LATENT_CHANNELS = 8
PROMPT_LENGTH = 24
UNET_TEXT_WIDTH = 128
FLOW_TEXT_WIDTHS = (64, 64)


def make_vae() -> AutoencoderKL:
    """Return an autoencoder 3x64x64 -> 8x8x8 with 1.3 million parameters (no attention: 2x faster on a
    CPU)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        sample_size=IMAGE_SIZE,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 80),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        shift_factor=0.0,  # SD3 pipelines add it
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=PROMPT_LENGTH,
        projection_dim=projection,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the text encoder of the diffusion base."""
    return CLIPTextModel(_text_config(tokenizer, UNET_TEXT_WIDTH, 3, UNET_TEXT_WIDTH))


def make_unet() -> UNet2DConditionModel:
    """Return the denoiser of the diffusion base. `attention_head_dim` counts heads, not their width."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 128),
        layers_per_block=1,
        cross_attention_dim=UNET_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_ddim() -> DDIMScheduler:
    """Return the diffusion base's schedule, the one of Stable Diffusion 1.5."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def make_flow_text_encoders(
    tokenizer: CLIPTokenizer,
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Return the two text encoders of the flow base; their tokens are joined, their projections are
    pooled."""
    first, second = (
        CLIPTextModelWithProjection(_text_config(tokenizer, width, 3, width)) for width in FLOW_TEXT_WIDTHS
    )
    return first, second


def make_flow_transformer() -> SD3Transformer2DModel:
    """Return the velocity network of the flow base: 64 image tokens and the prompt's tokens attend
    jointly."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=sum(FLOW_TEXT_WIDTHS),
        pooled_projection_dim=sum(FLOW_TEXT_WIDTHS),
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the flow base's schedule, without a shift."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def make_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a small dual encoder in the layout of PickScore (CLIPModel)."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=128,
        hidden_act="gelu",
    )
    return CLIPModel(
        CLIPConfig(
            text_config=_text_config(tokenizer, 96, 3, 128).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=128,
            logit_scale_init_value=2.6592,
        )
    )
