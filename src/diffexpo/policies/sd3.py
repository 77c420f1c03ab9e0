"""Rectified-flow transformers in the Stable Diffusion 3 and 3.5 layout, with the T5 encoder or without it (as
diffusers runs with `text_encoder_3=None`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from torch.nn.functional import pad

from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading
from diffexpo.policies.sizes import Shape, check_positions
from diffexpo.policies.text import clip_states, count_tokens, encode_text


@dataclass(kw_only=True, eq=False, repr=False)
class SD3Policy(FamilyPolicy):
    """A Stable Diffusion 3 or 3.5 model. The denoiser is told both CLIP encoders' penultimate states (B,
    clip_tokens, D1 + D2), pooled projections (B, P1 + P2) and, with T5, its states (B, sequence_length, D3).

    The zero tokens of an absent T5 are added in `denoise`: kept here, they would be most of a cached prompt.
    """

    text_width: int

    @property
    def has_t5(self) -> bool:
        return len(self.text_encoders) == 3

    @property
    def clip_tokens(self) -> int:
        """The pipeline cuts both CLIP texts at the first tokenizer's length."""
        return self.tokenizers[0].model_max_length

    @property
    def max_tokens(self) -> int:
        """Longest text that is read whole. T5's full text reaches the network; CLIP's states cover only its
        beginning."""
        return self.sequence_length if self.has_t5 else self.clip_tokens

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, marks included: T5's, or without T5 the larger number of the two CLIP
        tokenizers."""
        return count_tokens(self.tokenizers[2:] or self.tokenizers, prompts)

    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        states, pooled = clip_states(self.tokenizers[:2], self.text_encoders[:2], prompt, self.clip_tokens)
        tensors = {"clip_states": states, "pooled_projections": torch.cat(pooled, dim=-1)}
        if self.has_t5:
            output, _ = encode_text(self.tokenizers[2], self.text_encoders[2], prompt, self.sequence_length)
            tensors["t5_states"] = output[0]
        return tensors

    def denoise(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        states, t5 = told["clip_states"], told.get("t5_states")
        missing = self.sequence_length if t5 is None else 0
        states = pad(states, (0, self.text_width - states.shape[-1], 0, missing))
        return self.weights.network(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=states if t5 is None else torch.cat([states, t5], dim=1),
            pooled_projections=told["pooled_projections"],
            return_dict=False,
        )[0]


def load(ask: Loading) -> SD3Policy:
    """Load a StableDiffusion3Pipeline folder by components; its T5 encoder too, unless `model.drop_t5`."""
    # Refused before anything is loaded; the shift is known once the image's size is.
    ask.path("flow", image_tokens=1)
    parts = ask.parts()
    config, clip, t5 = parts.denoiser.config, parts.text_encoders[:2], parts.text_encoders[2:]
    pooled = sum(encoder.config.projection_dim for encoder in clip)
    ask.check_text(pooled, sum(encoder.config.hidden_size for encoder in clip), config, is_padded=True)
    if t5:
        ask.check_states(t5[0].config.d_model, config.joint_attention_dim, "text_encoder_3")
    ask.check_channels(parts)
    shape = ask.latent_shape(parts)
    height, width = (side // config.patch_size for side in shape[1:])
    check_positions(config, (height, width))
    path = ask.path("flow", image_tokens=height * width)
    return ask.policy(SD3Policy, parts, path=path, latent_shape=shape, text_width=config.joint_attention_dim)


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "hidden_states": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
    }
