"""Rectified-flow transformers in the FLUX.1 layout: dev, whose guidance is a number fed to the network, and
schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffexpo.config.families.flux import CARD
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading
from diffexpo.policies.loading import read_json
from diffexpo.policies.sizes import Shape
from diffexpo.policies.text import count_tokens, encode_text

PATCH = CARD.patch or 1
# The pipeline's own size, in latents: no file of the transformer names one. The autoencoder's does (1024
# pixels, the same).
LATENT_SIDE = 128


@dataclass(kw_only=True, eq=False, repr=False)
class FluxPolicy(FamilyPolicy):
    """A FLUX.1 model. The denoiser is told T5's states (B, max_tokens, D) and CLIP's pooled vector (B, P).

    Latents are (B,C,h,w) outside; tokens of 2 x 2 latents exist only inside `predict`. `guidance_embedding`
    is the scale fed to a guidance-distilled network (None: the network takes none). It is not classifier-free
    guidance: that belongs to the sampler and costs a second forward; the pipeline calls it true CFG and
    leaves it off.
    """

    guidance_embedding: float | None

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """T5's tokens of each prompt, the end mark included; above `max_tokens` the text would be cut. CLIP's
        pooled vector covers only its beginning."""
        return count_tokens(self.tokenizers[1:], prompts)

    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        (clip, t5), (clip_tokenizer, t5_tokenizer) = self.text_encoders, self.tokenizers
        pooled = encode_text(clip_tokenizer, clip, prompt)[0].pooler_output
        output, _ = encode_text(t5_tokenizer, t5, prompt, self.sequence_length)
        return {"t5_states": output[0], "pooled_projections": pooled}

    def denoise(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        height, width = latents.shape[-2:]
        states, guidance = told["t5_states"], None
        if self.guidance_embedding is not None:
            guidance = torch.full((len(latents),), self.guidance_embedding, device=self.device)
        velocity = self.weights.network(
            hidden_states=packed(latents),
            # In half precision the pipeline rounds the timestep before it divides by 1000; the network
            # multiplies again.
            timestep=timestep.to(self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=told["pooled_projections"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=image_positions(height, width, self.device).to(self.dtype),
            return_dict=False,
        )[0]
        return unpacked(velocity, height, width)


def packed(latents: Tensor) -> Tensor:
    """Latents (B,C,h,w) as tokens (B, h/2 w/2, 4C) of 2 x 2 latents each, row by row; within a token the
    channel is slowest.

    Source: FLUX.1's sampling code; diffusers' `FluxPipeline`.
    """
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2).contiguous()


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: tokens (B, h/2 w/2, 4C) as latents (B,C,h,w)."""
    blocks = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return pixel_shuffle(blocks, PATCH).contiguous()


def image_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(h/2 w/2, 3) float32: 0, row and column of each token; the rotary embedding turns by them. Texts stand
    at 0."""
    counts = (1, height // PATCH, width // PATCH)
    return torch.cartesian_prod(*(torch.arange(num, dtype=torch.float32, device=device) for num in counts))


def load(ask: Loading) -> FluxPolicy:
    """Load a FluxPipeline folder by components (image encoder and feature extractor are left out)."""
    # Refused before anything is loaded; the shift is known once the image's size is.
    ask.path("flow", image_tokens=1)
    parts = ask.parts()
    config, given = parts.denoiser.config, parts.denoiser.proj_out.out_features
    token = PATCH**2 * parts.vae.config.latent_channels
    if not config.in_channels == given == token:
        raise ask.error(
            f"the transformer takes {config.in_channels} and gives {given} channels a token, 2 x 2 latents "
            f"of the autoencoder are {token}; expected all equal (filling and editing models are not "
            "supported)"
        )
    clip, t5 = parts.text_encoders
    ask.check_text(clip.config.hidden_size, t5.config.d_model, config)
    pixels = read_json(ask.folder.path / "vae" / "config.json").get("sample_size")
    own = pixels // vae_factor(parts.vae) if isinstance(pixels, int) else LATENT_SIDE
    shape = ask.latent_shape(parts, own)
    return ask.policy(
        FluxPolicy,
        parts,
        # The pipeline gives its scheduler a list that ends at 1 / steps.
        path=ask.path("flow", image_tokens=shape[1] * shape[2] // PATCH**2, lowest_level="steps"),
        latent_shape=shape,
        guidance_embedding=ask.model.guidance_embedding if config.guidance_embeds else None,
    )


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    tokens = shape[1] // PATCH * (shape[2] // PATCH)
    return {
        "hidden_states": empty(tokens, config.in_channels),
        "encoder_hidden_states": empty(text_tokens, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
        "img_ids": torch.empty(tokens, 3, device="meta"),
        "txt_ids": torch.empty(text_tokens, 3, device="meta"),
        "guidance": empty(dtype=torch.float32) if config.guidance_embeds else None,
    }
