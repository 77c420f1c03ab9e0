"""Rectified-flow transformers in the Stable Diffusion 3 and 3.5 layout, with the T5 encoder or without it (as
diffusers runs with `text_encoder_3=None`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffexpo.errors import MissingError, PolicyError
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Shape, read_path
from diffexpo.policies.sizes import check_positions, latent_shape_of
from diffexpo.policies.t5 import T5Text, load_t5, read_sequence_length
from diffexpo.policies.text import clip_states, count_tokens, load_tokenizer
from diffexpo.types import Conditioning


@dataclass(kw_only=True, eq=False, repr=False)
class SD3Policy(FamilyPolicy):
    """A Stable Diffusion 3 or 3.5 model. The denoiser is told both CLIP encoders' penultimate states (B,
    clip_tokens, D1 + D2), pooled projections (B, P1 + P2) and, with T5, its states (B, sequence_length, D3).

    The zero tokens of an absent T5 are added in `predict`: kept here, they would be most of a cached prompt.
    """

    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_width: int
    sequence_length: int
    t5: T5Text | None = None

    @property
    def clip_tokens(self) -> int:
        """The pipeline cuts both CLIP texts at the first tokenizer's length."""
        return self.tokenizers[0].model_max_length

    @property
    def max_tokens(self) -> int:
        """Longest text that is read whole. T5's full text reaches the network; CLIP's states cover only its
        beginning."""
        return self.clip_tokens if self.t5 is None else self.t5.length

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.card.optional if self.t5 is None else ()

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, marks included: T5's, or without T5 the larger number of the two CLIP
        tokenizers."""
        return count_tokens(self.tokenizers if self.t5 is None else self.t5.tokenizer, prompts)

    def text_modules(self) -> list[nn.Module]:
        return [*self.text_encoders, *([] if self.t5 is None else [self.t5.encoder])]

    def encode_prompt(self, prompt: str) -> Conditioning:
        states, pooled = clip_states(
            self.tokenizers, self.text_encoders, prompt, self.device, self.clip_tokens
        )
        tensors = {"clip_states": states, "pooled_projections": torch.cat(pooled, dim=-1)}
        if self.t5 is not None:
            tensors["t5_states"] = self.t5.encode(prompt)[0]
        return Conditioning(tensors)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        states = self.on_device(conditioning.tensors["clip_states"])
        t5 = conditioning.tensors.get("t5_states")
        missing = self.sequence_length if t5 is None else 0
        states = pad(states, (0, self.text_width - states.shape[-1], 0, missing))
        if t5 is not None:
            states = torch.cat([states, self.on_device(t5)], dim=1)
        velocity = self.weights.network(
            hidden_states=self.on_device(x_t),
            timestep=self.path.timestep(t).to(self.device),
            encoder_hidden_states=states,
            pooled_projections=self.on_device(conditioning.tensors["pooled_projections"]),
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)


def load(ask: Loading) -> SD3Policy:
    """Load a StableDiffusion3Pipeline folder by components; its T5 encoder too, unless `model.drop_t5`."""
    folder = ask.folder
    # Refused before anything is loaded; the shift is known once the image's size is.
    read_path(folder, "flow", image_tokens=1)
    length = read_sequence_length(folder, ask.model, ask.card.text_tokens)
    has_t5 = folder.has("text_encoder_3") and not ask.model.drop_t5
    files = _weight_files(ask, () if has_t5 else ask.card.optional)
    tokenizers = (load_tokenizer(folder, "tokenizer"), load_tokenizer(folder, "tokenizer_2"))
    encoders = (ask.network("text_encoder"), ask.network("text_encoder_2"))
    t5 = load_t5(ask, ("text_encoder_3", "tokenizer_3"), length) if has_t5 else None
    transformer, vae = ask.denoiser(), ask.autoencoder()
    config, patch = transformer.config, transformer.config.patch_size
    _check_text_widths(ask.where, config, encoders, t5)
    shape = latent_shape_of(config, vae, ask.where, resolution=ask.model.resolution, patch=patch)
    height, width = (side // patch for side in shape[1:])
    check_positions(config, (height, width))
    return ask.policy(
        SD3Policy,
        files,
        transformer,
        path=read_path(folder, "flow", image_tokens=height * width),
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        latent_shape=shape,
        text_width=config.joint_attention_dim,
        sequence_length=length,
        t5=t5,
    )


def _weight_files(ask: Loading, without: tuple[str, ...]) -> list[FilePath]:
    """The weight files of the components; a T5 encoder that is named and not there can be left out
    instead."""
    try:
        return ask.files(without)
    except MissingError as error:
        if "text_encoder_3" not in str(error):
            raise
        raise MissingError(f"{error}, or leave T5 out with model.drop_t5=true") from error


def _check_text_widths(
    where: str, config: FrozenDict, encoders: Sequence[CLIPTextModelWithProjection], t5: T5Text | None
) -> None:
    """Raise PolicyError unless the encoders' vectors are those that the transformer takes."""
    pooled = sum(encoder.config.projection_dim for encoder in encoders)
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if pooled != config.pooled_projection_dim or width > config.joint_attention_dim:
        raise PolicyError(
            f"{where}: the text encoders give pooled {pooled} and states {width}, the transformer takes "
            f"{config.pooled_projection_dim} and {config.joint_attention_dim}; the components belong to "
            "different models"
        )
    if t5 is not None and t5.encoder.config.d_model != config.joint_attention_dim:
        raise PolicyError(
            f"{where}: text_encoder_3 gives states of {t5.encoder.config.d_model}, the transformer takes "
            f"{config.joint_attention_dim}; the components belong to different models"
        )


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "hidden_states": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.joint_attention_dim),
        "pooled_projections": empty(config.pooled_projection_dim),
    }
