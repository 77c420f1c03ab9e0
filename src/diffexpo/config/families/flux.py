"""FLUX.1: a rectified-flow transformer with CLIP's pooled vector and T5; only dev is fed its guidance."""

from diffexpo.config.families.card import Checkpoint, Family

CARD = Family(
    name="flux",
    pipeline="FluxPipeline",
    pattern=r"flux",
    papers=("flux2024",),
    denoiser=("transformer", "FluxTransformer2DModel"),
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    checkpoints=(
        Checkpoint("flux1-schnell", r"flux.*schnell", 11_891_178_560, "apache-2.0"),
        Checkpoint("flux1-dev", r"flux", 11_901_408_320, "FLUX.1 [dev] Non-Commercial License"),
    ),
    export_names=("flux-1", "flux1"),
    text_tokens=512,
    patch=2,
    # Attention and feed-forward layers of both streams; the choice of Flow-GRPO's FLUX script (rank 64, alpha
    # 128 there).
    lora_targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    default_guidance=1.0,
    is_fed_guidance=True,
)
