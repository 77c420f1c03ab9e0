"""PixArt-Sigma: a diffusion transformer that reads T5's states through cross-attention."""

from diffexpo.config.families.card import Checkpoint, Family

CARD = Family(
    name="pixart",
    pipeline="PixArtSigmaPipeline",
    pattern=r"pixart",
    # Sigma is trained on from the weights of alpha.
    papers=("chen2024pixartsigma", "chen2023pixartalpha"),
    denoiser=("transformer", "PixArtTransformer2DModel"),
    text_encoders={"text_encoder": "T5EncoderModel"},
    checkpoints=(Checkpoint("pixart-sigma", r"pixart.*sigma", 610_856_096, "openrail++"),),
    export_names=("pixart-sigma", "pixart-sigma"),
    text_tokens=300,
    # A bias of the keys adds the same number to all logits of a query, which softmax drops. Its gradient is
    # rounding, which AdamW would scale up to full steps.
    inert=("*.to_k.bias",),
    call={"use_resolution_binning": False, "clean_caption": False},
)
