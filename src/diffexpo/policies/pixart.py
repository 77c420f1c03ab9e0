"""Diffusion transformers in the PixArt-Sigma layout: T5 states through cross-attention, eps prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading
from diffexpo.policies.sizes import Shape
from diffexpo.policies.text import encode_text

# What PixArt-alpha feeds besides the time, and Sigma does not.
NO_SIZE = {"resolution": None, "aspect_ratio": None}


@dataclass(kw_only=True, eq=False, repr=False)
class PixArtPolicy(FamilyPolicy):
    """A PixArt-Sigma model. The denoiser is told T5's states (B, max_tokens, D) of the prompts in lower case,
    and the mask (B, max_tokens) of their tokens."""

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        return super().count_tokens([prepared(prompt) for prompt in prompts])

    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        text, length = prepared(prompt), self.sequence_length
        output, mask = encode_text(self.tokenizers[0], self.text_encoder, text, length, is_masked=True)
        return {"encoder_hidden_states": output[0], "encoder_attention_mask": mask}

    def denoise(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        output = self.weights.network(
            latents, timestep=timestep, added_cond_kwargs=NO_SIZE, return_dict=False, **told
        )[0]
        # Without the channels of a learned variance.
        return output[:, : latents.shape[1]].contiguous()


def prepared(prompt: str) -> str:
    """The text that the pipeline hands to its tokenizer (with `clean_caption=False`): lower case, no blanks
    around it."""
    return prompt.lower().strip()


def load(ask: Loading) -> PixArtPolicy:
    """Load a PixArtSigmaPipeline folder by components."""
    path, parts = ask.path("vp"), ask.parts()
    transformer, channels = parts.denoiser, parts.vae.config.latent_channels
    config = transformer.config
    if transformer.use_additional_conditions:
        raise ask.error(
            "the transformer is also fed the image's size (use_additional_conditions), as PixArt-alpha's at "
            "1024 pixels; expected a PixArt-Sigma transformer"
        )
    if config.in_channels != channels or transformer.out_channels not in (channels, 2 * channels):
        raise ask.error(
            f"the transformer takes {config.in_channels} and gives {transformer.out_channels} channels, the "
            f"autoencoder has {channels}; expected the same, or twice as many given (a learned variance, "
            "which is left out)"
        )
    ask.check_states(parts.text_encoders[0].config.d_model, config.caption_channels)
    return ask.policy(PixArtPolicy, parts, path=path, latent_shape=ask.latent_shape(parts))


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "hidden_states": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.caption_channels),
        "encoder_attention_mask": empty(text_tokens),
        "added_cond_kwargs": NO_SIZE,
    }
