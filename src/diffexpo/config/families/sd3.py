"""Stable Diffusion 3 and 3.5: a rectified-flow transformer with two CLIP text encoders, and T5 or not."""

from diffexpo.config.families.card import Checkpoint, Family

COMMUNITY = "Stability AI Community License"
CARD = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    pattern=r"sd-?3|stable-diffusion-3",
    papers=("esser2024sd3",),
    denoiser=("transformer", "SD3Transformer2DModel"),
    text_encoders={
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    checkpoints=(
        Checkpoint("sd35-medium", r"(stable-diffusion-|sd-?)3[.-]?5.*medium", 2_243_171_520, COMMUNITY),
        Checkpoint("sd3-medium", r"(stable-diffusion-|sd-?)3(?![.-]?5)", 2_028_328_000, COMMUNITY),
    ),
    export_names=("stable-diffusion-3", "sd3"),
    optional=("text_encoder_3", "tokenizer_3"),
    text_tokens=256,
    has_clip_states=True,
    # The last block drops its text stream, so the queries made for it, and their norm where there is one.
    inert=("transformer_blocks.{last}.attn.add_q_proj.*", "transformer_blocks.{last}.attn.norm_added_q.*"),
    input_convolution="pos_embed.proj",
)
