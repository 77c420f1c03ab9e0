"""Both bases share one autoencoder, whose latents have unit deviation."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from diffexpo.worlds import emoji
from worlds.emoji.train_vae import reconstruction_psnr


def test_both_bases_share_one_autoencoder_with_unit_latents() -> None:
    first, second = (
        AutoencoderKL.from_pretrained(emoji.asset_path(name) / "vae") for name in ("diffusion", "flow")
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [row for row in emoji.load_rows() if row["split_concept"] == "heldout"][::12]
    pictures = emoji.load_images([row["id"] for row in rows])
    with torch.no_grad():
        latents = (
            first.encode(torch.from_numpy(pictures) * 2 - 1).latent_dist.mean * first.config.scaling_factor
        )
    assert 0.8 < float(latents.std()) < 1.2
    assert reconstruction_psnr(first, pictures) > 24.5
