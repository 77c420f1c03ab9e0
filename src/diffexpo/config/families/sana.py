"""SANA and SANA 1.5: a linear diffusion transformer with Gemma 2 and a deep autoencoder."""

from diffexpo.config.families.card import Checkpoint, Family

LICENCE = "NVIDIA License, Gemma Terms of Use"
# The distilled models (Sprint) have another pipeline.
NOT_SPRINT = r"^(?!.*sprint).*"
CARD = Family(
    name="sana",
    pipeline="SanaPipeline",
    pattern=r"(^|[/_.-])sana",
    papers=("xie2024sana",),
    papers_by_name={r"sana.?1.?5": ("xie2025sana15",)},
    denoiser=("transformer", "SanaTransformer2DModel"),
    text_encoders={"text_encoder": "Gemma2Model"},
    autoencoder="AutoencoderDC",
    checkpoints=(
        Checkpoint("sana15-4800m", NOT_SPRINT + r"sana.?1.?5.*4\.?8", 4_721_825_952, LICENCE),
        Checkpoint("sana15-1600m", NOT_SPRINT + r"sana.?1.?5.*1\.?6", 1_604_641_952, LICENCE),
        Checkpoint("sana-1600m", NOT_SPRINT + r"sana.*1(\.6b|600m)", 1_604_462_752, LICENCE),
        Checkpoint("sana-600m", NOT_SPRINT + r"sana.*(0\.6b|600m)", 591_747_872, LICENCE),
    ),
    export_names=("sana", "sana"),
    text_tokens=300,
    text_reader="Gemma 2",
    # As in PixArt, in the attention to the text. SANA 1.5 normalises the keys after the bias is added; the
    # attention over the image is linear, without a softmax.
    inert=("*.attn2.to_k.bias",),
    inert_unless="qk_norm",
    # Its call draws 1024 pixels whatever the checkpoint's own size.
    call={"use_resolution_binning": False},
    call_needs_size=True,
)
