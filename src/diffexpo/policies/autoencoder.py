"""What an autoencoder does for every family: images to latents and back, in slices and tiles if asked to."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import Tensor

from diffexpo.errors import PolicyError

# Images the autoencoder decodes in one call: few enough for a CPU's cache (a quarter faster than 64) and a
# GPU's memory.
DECODE_BATCH = 16


def vae_factor(vae: ModelMixin) -> int:
    """Pixels per latent in each direction; 8 for Stable Diffusion."""
    widths = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return 2 ** (len(widths) - 1)


def decode_with(vae: ModelMixin, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scaled latents (B,C,h,w), on any device, to float32 images (B,3,H,W) clamped to [0, 1], on the
    autoencoder's.

    Latents of a half-precision denoiser (`dtype`) are checked: a value beyond its range spoils an image. In
    float32 an image that is not finite is excluded where it is scored.

    Raises:
        PolicyError: says how many images are spoilt and what to do.
    """
    if dtype != torch.float32:
        _check_finite(latents, dtype)
    shift = vae.config.get("shift_factor") or 0.0
    unscaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
    with torch.no_grad():
        decoded = torch.cat([vae.decode(few, return_dict=False)[0] for few in unscaled.split(DECODE_BATCH)])
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def _check_finite(latents: Tensor, dtype: torch.dtype) -> None:
    """Raise PolicyError if latents of a half-precision denoiser are not finite."""
    spoilt = ~torch.isfinite(latents).flatten(1).all(dim=1)
    if bool(spoilt.any()):
        name = str(dtype).removeprefix("torch.")
        others = "bfloat16 (its range is that of float32) or float32" if dtype == torch.float16 else "float32"
        raise PolicyError(
            f"model.dtype={name}: the denoiser gave values that are not finite in {int(spoilt.sum())} of "
            f"{len(latents)} images; expected finite latents. Set model.dtype to {others}; if it persists "
            "there, training has diverged: lower training.learning_rate or algorithm.beta"
        )


def encode_with(vae: ModelMixin, images: Tensor) -> Tensor:
    """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w): the posterior mean (no random number), or what
    an autoencoder without a distribution gives."""
    shift = vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        encoded = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return (latents - shift) * vae.config.scaling_factor
