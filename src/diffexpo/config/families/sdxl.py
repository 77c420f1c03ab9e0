"""Stable Diffusion XL: a UNet with two CLIP text encoders, a pooled vector and the image's size."""

from diffexpo.config.families.card import Checkpoint, Family

CARD = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    pattern=r"sdxl|stable-diffusion-xl",
    papers=("podell2023sdxl",),
    denoiser=("unet", "UNet2DConditionModel"),
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    checkpoints=(Checkpoint("sdxl", r"sdxl|stable-diffusion-xl", 2_567_463_684, "openrail++"),),
    export_names=("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    has_clip_states=True,
    has_kohya_file=True,
)
