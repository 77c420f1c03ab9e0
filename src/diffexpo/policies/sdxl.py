"""UNet latent diffusion in the Stable Diffusion XL layout: two text encoders, a pooled vector and the image's
size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from diffexpo.policies import unet as plain
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.family import Empty, Inputs, Loading
from diffexpo.policies.sizes import Shape
from diffexpo.policies.text import clip_states

# Original height and width, top and left of the crop, target height and width.
NUM_TIME_IDS = 6


@dataclass(kw_only=True, eq=False, repr=False)
class SDXLPolicy(plain.UNetPolicy):
    """A Stable Diffusion XL base model. The denoiser is told both encoders' penultimate states (B,
    max_tokens, D1 + D2) and the second one's pooled projection (B, P).

    The empty prompt is what guidance sets against the prompt: zeros if the model's
    `force_zeros_for_empty_prompt` says so, as in the pipeline.
    """

    is_empty_zero: bool

    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        states, (_, pooled) = clip_states(self.tokenizers, self.text_encoders, prompt)
        tensors = {"encoder_hidden_states": states, "add_text_embeds": pooled}
        if self.is_empty_zero and prompt == "":
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        return tensors

    def further_inputs(self, latents: Tensor, told: Mapping[str, Tensor]) -> dict[str, Any]:
        """The pooled text, and the image's size (B, 6): original height and width, crop at (0, 0), target
        size.

        The size follows from the latents (B,C,h,w), because images of a run may differ in size.
        """
        height, width = (side * vae_factor(self.vae) for side in latents.shape[-2:])
        size = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)
        ids = size.expand(len(latents), -1).to(self.dtype)
        return {"added_cond_kwargs": {"text_embeds": told["add_text_embeds"], "time_ids": ids}}


def load(ask: Loading) -> SDXLPolicy:
    """Load a StableDiffusionXLPipeline folder by components; image encoder and refiner are not part of it."""
    path, parts = ask.path("vp"), ask.parts()
    plain.check_unet(ask, parts)
    config = parts.denoiser.config
    if config.addition_embed_type != "text_time":
        raise ask.error(
            f"unet.addition_embed_type={config.addition_embed_type!r}; expected 'text_time', as of a Stable "
            "Diffusion XL base model"
        )
    told = parts.text_encoders[1].config.projection_dim + NUM_TIME_IDS * config.addition_time_embed_dim
    if config.projection_class_embeddings_input_dim != told:
        raise ask.error(
            f"the UNet is told {config.projection_class_embeddings_input_dim} numbers on text and size, the "
            f"second text encoder and {NUM_TIME_IDS} sizes give {told}; expected a base model and its own "
            "text encoders (a refiner takes 5 sizes)"
        )
    first, second = (tokenizer.model_max_length for tokenizer in parts.tokenizers)
    if first != second:
        raise ask.error(
            f"the tokenizers cut at {first} and {second} tokens; expected one length, their states stand "
            "side by side"
        )
    if parts.vae.config.get("latents_mean") is not None:
        raise ask.error(
            "vae.latents_mean is set; latents that are shifted channel by channel are not supported, "
            "expected a scaling_factor alone"
        )
    is_empty_zero = bool(ask.folder.index.get("force_zeros_for_empty_prompt", True))
    shape = ask.latent_shape(parts)
    return ask.policy(SDXLPolicy, parts, path=path, latent_shape=shape, is_empty_zero=is_empty_zero)


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    pooled = config.projection_class_embeddings_input_dim - NUM_TIME_IDS * config.addition_time_embed_dim
    told = {"text_embeds": empty(pooled), "time_ids": empty(NUM_TIME_IDS)}
    return {**plain.denoiser_inputs(config, shape, text_tokens, empty), "added_cond_kwargs": told}
