"""Diffusion transformers in the PixArt-Sigma layout: T5 states through cross-attention, eps prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import PolicyError
from diffexpo.policies.loading import (
    DTYPES,
    ModelFolder,
    check_weight_files,
    choose_device,
    component_folder,
    fingerprint_files,
    load_module,
    move_modules,
    weight_files,
)
from diffexpo.policies.t5 import T5Text, load_t5, read_sequence_length, refuse_drop_t5
from diffexpo.policies.unet import decode_with, encode_with, latent_size, make_weights, read_path
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "PixArtSigmaPipeline"
T5_TOKENS = 300
# What PixArt-alpha feeds beside the time, and Sigma does not.
NO_SIZE = {"resolution": None, "aspect_ratio": None}


class PixArtPolicy:
    """A PixArt-Sigma model that can denoise. See `diffexpo.types.Policy`."""

    def __init__(
        self,
        *,
        folder: ModelFolder,
        path: DiffusionPath,
        weights: LoraWeightSets | CopyWeightSets,
        vae: AutoencoderKL,
        t5: T5Text,
        latent_shape: tuple[int, int, int],
        fingerprint: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.path = path
        self.weights = weights
        self.vae = vae
        self.t5 = t5
        self.latent_shape = latent_shape
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.device = device
        self.max_tokens: int = t5.length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the end mark included; above `max_tokens` the text would be cut."""
        return self.t5.count_tokens([prepared(prompt) for prompt in prompts])

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """T5's states (B, max_tokens, D) of the prompts in lower case, and the mask (B, max_tokens) of their
        tokens.

        Each distinct text runs alone, so that its bits never depend on the texts beside it.
        """
        move_modules((self.t5.encoder,), self.device)
        encoded = {
            prompt: self.t5.encode(prepared(prompt), is_masked=True) for prompt in dict.fromkeys(prompts)
        }
        return Conditioning(
            {
                "encoder_hidden_states": torch.cat([encoded[prompt][0] for prompt in prompts]),
                "encoder_attention_mask": torch.cat([encoded[prompt][1] for prompt in prompts]),
            }
        )

    def release_text_encoders(self) -> None:
        """Put the text encoder into main memory until the next text is to be encoded."""
        move_modules((self.t5.encoder,), torch.device("cpu"))

    def encode_images(self, images: Tensor) -> Tensor:
        return encode_with(self.vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's own output for x_t (B,C,h,w) at t (B,), in x_t's type, without the channels of a
        learned variance."""
        prediction = self.weights.network(
            x_t.to(self.device, self.dtype),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(self.device, self.dtype),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"].to(self.device),
            timestep=self.path.timestep(t).to(self.device),
            added_cond_kwargs=NO_SIZE,
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]].to(x_t.dtype).contiguous()


def prepared(prompt: str) -> str:
    """The text that the pipeline hands to its tokenizer (with `clean_caption=False`): lower case, no blanks
    around it."""
    return prompt.lower().strip()


def load(
    folder: ModelFolder,
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
) -> PixArtPolicy:
    """Load a PixArtSigmaPipeline folder by components."""
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    refuse_drop_t5(folder, model)
    path = read_path(folder, "vp")
    files = [
        file
        for component in ("text_encoder", "transformer", "vae")
        for file in weight_files(component_folder(folder, component), folder.variant)
    ]
    check_weight_files(files)
    length = read_sequence_length(folder, model, T5_TOKENS)
    t5 = load_t5(folder, ("text_encoder", "tokenizer"), length, dtype, device)
    transformer = load_module(PixArtTransformer2DModel, folder, "transformer", dtype, device)
    vae = load_module(AutoencoderKL, folder, "vae", torch.float32, device)
    _check_fit(folder, transformer, vae, t5)
    config = transformer.config
    size = latent_size(config.sample_size, vae, str(folder.path), model.resolution, config.patch_size)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return PixArtPolicy(
        folder=folder,
        path=path,
        weights=make_weights(transformer, tuning, seed, inert_parameters(transformer)),
        vae=vae,
        t5=t5,
        latent_shape=(config.in_channels, *size),
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
    )


def inert_parameters(transformer: PixArtTransformer2DModel) -> tuple[str, ...]:
    """Names of what changes nothing: a bias of the keys adds the same number to all logits of a query, which
    softmax drops.

    Their gradient is rounding, which AdamW would scale up to full steps.
    """
    return tuple(name for name, _ in transformer.named_parameters() if name.endswith(".to_k.bias"))


def _check_fit(
    folder: ModelFolder, transformer: PixArtTransformer2DModel, vae: AutoencoderKL, t5: T5Text
) -> None:
    """Raise PolicyError unless the transformer is Sigma's and takes what the others give."""
    config, channels = transformer.config, vae.config.latent_channels
    if transformer.use_additional_conditions:
        raise PolicyError(
            f"{folder.path}: the transformer is also fed the picture's size (use_additional_conditions), as "
            f"PixArt-alpha's at "
            "1024 pixels; expected a PixArt-Sigma transformer"
        )
    if config.in_channels != channels or transformer.out_channels not in (channels, 2 * channels):
        raise PolicyError(
            f"{folder.path}: the transformer takes {config.in_channels} and gives {transformer.out_channels} "
            f"channels, the "
            f"autoencoder has {channels}; expected the same, or twice as many given (a learned variance, "
            f"which is left out)"
        )
    if t5.encoder.config.d_model != config.caption_channels:
        raise PolicyError(
            f"{folder.path}: the text encoder gives states of {t5.encoder.config.d_model}, the transformer "
            f"takes "
            f"{config.caption_channels}; the components belong to different models"
        )
