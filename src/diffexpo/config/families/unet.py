"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder."""

from diffexpo.config.families.card import Checkpoint, Family

CARD = Family(
    name="unet",
    pipeline="StableDiffusionPipeline",
    pattern=r"sd-?[12]|stable-diffusion-(v1|v2|2)",
    papers=("rombach2022ldm",),
    denoiser=("unet", "UNet2DConditionModel"),
    text_encoders={"text_encoder": "CLIPTextModel"},
    checkpoints=(
        Checkpoint("sd21", r"(stable-diffusion-|sd-?)(v?2)", 865_910_724, "openrail++"),
        Checkpoint("sd15", r"(stable-diffusion-|sd-?)(v?1)", 859_520_964, "creativeml-openrail-m"),
    ),
    export_names=("stable-diffusion-v1", "sd_v1"),
    # The text encoder of Stable Diffusion 2.
    export_names_by_text_width={1024: ("stable-diffusion-v2", "sd_v2")},
    has_clip_states=True,
    has_kohya_file=True,
    input_convolution="conv_in",
)
