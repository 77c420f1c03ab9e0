"""Rectified-flow transformers in the Stable Diffusion 3 layout, without the T5 encoder (as diffusers runs
with `text_encoder_3=None`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import PolicyError
from diffexpo.policies.loading import (
    DTYPES,
    ModelFolder,
    check_weight_files,
    choose_device,
    component_folder,
    count_tokens,
    fingerprint_files,
    load_module,
    load_tokenizer,
    read_json,
    weight_files,
)
from diffexpo.policies.unet import decode_with, encode_with, latent_shape_of, make_weights, read_path
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "StableDiffusion3Pipeline"
# diffusers puts this many zero tokens where T5 would speak (its default `max_sequence_length`). A folder
# trained with another number says so in `diffexpo.json`: {"max_sequence_length": 0}.
T5_TOKENS = 256
SETTINGS_FILE = "diffexpo.json"


class SD3Policy:
    """A Stable Diffusion 3 model that can denoise. See `diffexpo.types.Policy`."""

    def __init__(
        self,
        *,
        folder: ModelFolder,
        path: DiffusionPath,
        weights: LoraWeightSets | CopyWeightSets,
        vae: AutoencoderKL,
        text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        latent_shape: tuple[int, int, int],
        text_width: int,
        t5_tokens: int,
        fingerprint: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.path = path
        self.weights = weights
        self.vae = vae
        self.text_encoders = text_encoders
        self.tokenizers = tokenizers
        self.latent_shape = latent_shape
        self.text_width = text_width
        self.t5_tokens = t5_tokens
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.device = device
        # The pipeline cuts both texts at the first tokenizer's length.
        self.max_tokens: int = tokenizers[0].model_max_length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt (the larger of the two tokenizers), start and end included."""
        first, second = (count_tokens(tokenizer, prompts) for tokenizer in self.tokenizers)
        return [max(pair) for pair in zip(first, second, strict=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Both encoders' penultimate states (B, max_tokens, D1 + D2) and pooled projections (B, P1 + P2).

        Each distinct text runs alone, so that its bits never depend on the texts beside it. The zero tokens
        of the absent T5 are added in `predict`: kept here, they would be most of a cached prompt.
        """
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                [prompt],
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        return Conditioning(
            {"clip_states": torch.cat(states, dim=-1), "pooled_projections": torch.cat(pooled, dim=-1)}
        )

    def encode_images(self, images: Tensor) -> Tensor:
        return encode_with(self.vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        states = conditioning.tensors["clip_states"].to(self.device, self.dtype)
        states = pad(states, (0, self.text_width - states.shape[-1], 0, self.t5_tokens))
        velocity = self.weights.network(
            hidden_states=x_t.to(self.device, self.dtype),
            timestep=self.path.timestep(t).to(self.device),
            encoder_hidden_states=states,
            pooled_projections=conditioning.tensors["pooled_projections"].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)


def load_sd3(
    folder: ModelFolder,
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
) -> SD3Policy:
    """Load a StableDiffusion3Pipeline folder by components; a T5 encoder, if there is one, is left out."""
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    path = read_path(folder, "flow")
    files = [
        file
        for component in ("text_encoder", "text_encoder_2", "transformer", "vae")
        for file in weight_files(component_folder(folder, component), folder.variant)
    ]
    check_weight_files(files)
    tokenizers = tuple(load_tokenizer(folder, name) for name in ("tokenizer", "tokenizer_2"))
    encoders = tuple(
        load_module(CLIPTextModelWithProjection, folder, name, dtype, device)
        for name in ("text_encoder", "text_encoder_2")
    )
    transformer = load_module(SD3Transformer2DModel, folder, "transformer", dtype, device)
    vae = load_module(AutoencoderKL, folder, "vae", torch.float32, device)
    config = transformer.config
    pooled = sum(encoder.config.projection_dim for encoder in encoders)
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if pooled != config.pooled_projection_dim or width > config.joint_attention_dim:
        raise PolicyError(
            f"{folder.path}: the text encoders give pooled {pooled} and states {width}, the transformer "
            f"takes {config.pooled_projection_dim} and {config.joint_attention_dim}; the components belong "
            "to different models"
        )
    latent_shape = latent_shape_of(config, vae, str(folder.path))
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return SD3Policy(
        folder=folder,
        path=path,
        weights=make_weights(transformer, tuning, seed, inert_parameters(config)),
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        latent_shape=latent_shape,
        text_width=config.joint_attention_dim,
        t5_tokens=read_t5_tokens(folder),
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
    )


def inert_parameters(config: FrozenDict) -> tuple[str, ...]:
    """Name prefixes of what reaches nothing: the last block drops its text stream, so the queries made for it, and their norm
    where there is one.
    """
    return tuple(
        f"transformer_blocks.{config.num_layers - 1}.attn.{part}." for part in ("add_q_proj", "norm_added_q")
    )


def read_t5_tokens(folder: ModelFolder) -> int:
    """How many zero tokens stand for the absent T5: what `diffexpo.json` says, else diffusers' default.

    Raises:
        PolicyError: the file holds no such number.
    """
    file = folder.path / SETTINGS_FILE
    if not file.is_file():
        return T5_TOKENS
    count = read_json(file).get("max_sequence_length")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= 512:
        raise PolicyError(f"{file}: max_sequence_length={count!r}; expected an integer from 0 to 512")
    return count
