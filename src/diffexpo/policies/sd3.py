"""Rectified-flow transformers in the Stable Diffusion 3 and 3.5 layout, with the T5 encoder or without it (as
diffusers runs with `text_encoder_3=None`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import LowestLevel
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import MissingError, PolicyError
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
    move_modules,
    read_json,
    weight_files,
)
from diffexpo.policies.sizes import check_positions
from diffexpo.policies.t5 import (
    SETTINGS_FILE,  # noqa: F401  (a name that others take from here)
    T5Text,
    load_t5,
    read_sequence_length,
)
from diffexpo.policies.unet import decode_with, encode_with, latent_shape_of, make_weights
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "StableDiffusion3Pipeline"
# T5 reads this many tokens, or diffusers puts as many zero tokens where T5 would speak: the pipeline's
# default `max_sequence_length`. A folder trained with another number says so in `diffexpo.json`.
T5_TOKENS = 256


class SD3Policy:
    """A Stable Diffusion 3 or 3.5 model that can denoise. See `diffexpo.types.Policy`."""

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
        t5: T5Text | None = None,
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
        self.t5 = t5
        # The pipeline cuts both CLIP texts at the first tokenizer's length.
        self.clip_tokens: int = tokenizers[0].model_max_length
        # What T5 reads whole reaches the network whole, though CLIP reads its beginning only.
        self.max_tokens: int = self.clip_tokens if t5 is None else t5.length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, marks included: T5's, or without T5 the larger number of the two CLIP
        tokenizers."""
        if self.t5 is not None:
            return self.t5.count_tokens(prompts)
        first, second = (count_tokens(tokenizer, prompts) for tokenizer in self.tokenizers)
        return [max(pair) for pair in zip(first, second, strict=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Both CLIP encoders' penultimate states (B, clip_tokens, D1 + D2), pooled projections (B, P1 + P2)
        and, with T5, its states (B, t5_tokens, D3).

        Each distinct text runs alone, so that its bits never depend on the texts beside it. The zero tokens
        of an absent T5 are added in `predict`: kept here, they would be most of a cached prompt.
        """
        move_modules(self.text_modules(), self.device)
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def release_text_encoders(self) -> None:
        """Put the text encoders into main memory until the next text is to be encoded."""
        move_modules(self.text_modules(), torch.device("cpu"))

    def text_modules(self) -> list[nn.Module]:
        """The text encoders in use, T5 last."""
        return [*self.text_encoders, *([] if self.t5 is None else [self.t5.encoder])]

    def _encode(self, prompt: str) -> Conditioning:
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                [prompt],
                padding="max_length",
                max_length=self.clip_tokens,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        tensors = {"clip_states": torch.cat(states, dim=-1), "pooled_projections": torch.cat(pooled, dim=-1)}
        if self.t5 is not None:
            tensors["t5_states"] = self.t5.encode(prompt)[0]
        return Conditioning(tensors)

    def encode_images(self, images: Tensor) -> Tensor:
        return encode_with(self.vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        states = conditioning.tensors["clip_states"].to(self.device, self.dtype)
        t5 = conditioning.tensors.get("t5_states")
        missing = self.t5_tokens if t5 is None else 0
        states = pad(states, (0, self.text_width - states.shape[-1], 0, missing))
        if t5 is not None:
            states = torch.cat([states, t5.to(self.device, self.dtype)], dim=1)
        velocity = self.weights.network(
            hidden_states=x_t.to(self.device, self.dtype),
            timestep=self.path.timestep(t).to(self.device),
            encoder_hidden_states=states,
            pooled_projections=conditioning.tensors["pooled_projections"].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return velocity.to(x_t.dtype)


def load(
    folder: ModelFolder,
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
) -> SD3Policy:
    """Load a StableDiffusion3Pipeline folder by components; its T5 encoder too, unless `model.drop_t5`."""
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    # Refused before anything is loaded; the shift is known once the picture's size is.
    read_flow_path(folder, image_tokens=1)
    length = read_sequence_length(folder, model, T5_TOKENS)
    t5_components = ("text_encoder_3",) if folder.has("text_encoder_3") and not model.drop_t5 else ()
    files = _weight_files(folder, ("text_encoder", "text_encoder_2", *t5_components, "transformer", "vae"))
    check_weight_files(files)
    tokenizers = tuple(load_tokenizer(folder, name) for name in ("tokenizer", "tokenizer_2"))
    encoders = tuple(
        load_module(CLIPTextModelWithProjection, folder, name, dtype, device)
        for name in ("text_encoder", "text_encoder_2")
    )
    components = ("text_encoder_3", "tokenizer_3")
    t5 = load_t5(folder, components, length, dtype, device) if t5_components else None
    transformer = load_module(SD3Transformer2DModel, folder, "transformer", dtype, device)
    vae = load_module(AutoencoderKL, folder, "vae", torch.float32, device)
    config = transformer.config
    _check_text_widths(folder, config, encoders, t5)
    patch = config.patch_size
    latent_shape = latent_shape_of(config, vae, str(folder.path), resolution=model.resolution, patch=patch)
    height, width = (side // patch for side in latent_shape[1:])
    check_positions(config, (height, width))
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return SD3Policy(
        folder=folder,
        path=read_flow_path(folder, height * width),
        weights=make_weights(transformer, tuning, seed, inert_parameters(config)),
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        latent_shape=latent_shape,
        text_width=config.joint_attention_dim,
        t5_tokens=length,
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
        t5=t5,
    )


def read_flow_path(
    folder: ModelFolder, image_tokens: int, lowest_level: LowestLevel | None = None
) -> DiffusionPath:
    """The path of the folder's flow scheduler, whose shift may follow from the size of the picture.

    Args:
        folder: The model.
        image_tokens: Tokens that the transformer makes of a picture.
        lowest_level: Of a pipeline that gives the scheduler its own list of levels; None is the scheduler's.
    Returns:
        A path of kind "flow".
    Raises:
        PolicyError: a scheduler of the other kind, or one that is not reproduced here.
    """
    config_file = component_folder(folder, "scheduler") / "scheduler_config.json"
    path = DiffusionPath.from_scheduler_config(
        read_json(config_file), image_tokens=image_tokens, lowest_level=lowest_level
    )
    if path.kind != "flow":
        raise PolicyError(
            f"{config_file}: describes a {path.kind!r} path, expected 'flow' for a {folder.pipeline_class}"
        )
    return path


def inert_parameters(config: FrozenDict) -> tuple[str, ...]:
    """Name prefixes of what reaches nothing: the last block drops its text stream, so the queries made for
    it, and their norm where there is one.
    """
    return tuple(
        f"transformer_blocks.{config.num_layers - 1}.attn.{part}." for part in ("add_q_proj", "norm_added_q")
    )


def _weight_files(folder: ModelFolder, components: tuple[str, ...]) -> list[FilePath]:
    """The weight files of the components; a T5 encoder that is named and not there can be left out
    instead."""
    try:
        return [
            file
            for component in components
            for file in weight_files(component_folder(folder, component), folder.variant)
        ]
    except MissingError as error:
        if "text_encoder_3" not in str(error):
            raise
        raise MissingError(f"{error}, or leave T5 out with model.drop_t5=true") from error


def _check_text_widths(
    folder: ModelFolder,
    config: FrozenDict,
    encoders: Sequence[CLIPTextModelWithProjection],
    t5: T5Text | None,
) -> None:
    """Raise PolicyError unless the encoders' vectors are those that the transformer takes."""
    pooled = sum(encoder.config.projection_dim for encoder in encoders)
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if pooled != config.pooled_projection_dim or width > config.joint_attention_dim:
        raise PolicyError(
            f"{folder.path}: the text encoders give pooled {pooled} and states {width}, the transformer "
            f"takes {config.pooled_projection_dim} and {config.joint_attention_dim}; the components belong "
            "to different models"
        )
    if t5 is not None and t5.encoder.config.d_model != config.joint_attention_dim:
        raise PolicyError(
            f"{folder.path}: text_encoder_3 gives states of {t5.encoder.config.d_model}, the transformer "
            f"takes "
            f"{config.joint_attention_dim}; the components belong to different models"
        )
