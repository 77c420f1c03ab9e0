"""Rectified-flow transformers in the FLUX.1 layout: dev, whose guidance is a number fed to the network, and
schnell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

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
    load_tokenizer,
    move_modules,
    read_json,
    weight_files,
)
from diffexpo.policies.sd3 import read_flow_path
from diffexpo.policies.sizes import FLUX_PATCH as PATCH
from diffexpo.policies.sizes import vae_factor
from diffexpo.policies.t5 import T5Text, load_t5, read_sequence_length, refuse_drop_t5
from diffexpo.policies.unet import decode_with, encode_with, latent_size, make_weights
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets, with_targets
from diffexpo.types import Conditioning

PIPELINE = "FluxPipeline"
T5_TOKENS = 512
# The pipeline's own size, in latents: no file of the transformer names one. The autoencoder's does (1024
# pixels, the same).
LATENT_SIDE = 128
# Both streams' attention and feed-forward layers; the choice of Flow-GRPO's FLUX script (rank 64, alpha 128
# there).
FLUX_LORA_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)


class FluxPolicy:
    """A FLUX.1 model that can denoise. See `diffexpo.types.Policy`.

    Latents are (B,C,h,w) outside; tokens of 2 x 2 latents exist only inside `predict`. `guidance_embedding`
    is the scale fed to a guidance-distilled network (None: the network takes none). It is no classifier-free
    guidance: that is the sampler's, costs a second forward, and the pipeline calls it true CFG and leaves it
        off.
    """

    default_guidance = 1.0

    def __init__(
        self,
        *,
        folder: ModelFolder,
        path: DiffusionPath,
        weights: LoraWeightSets | CopyWeightSets,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        t5: T5Text,
        latent_shape: tuple[int, int, int],
        guidance_embedding: float | None,
        fingerprint: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.path = path
        self.weights = weights
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.t5 = t5
        self.latent_shape = latent_shape
        self.guidance_embedding = guidance_embedding
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.device = device
        # What T5 reads whole reaches the network whole, though CLIP's pooled vector is of the beginning only.
        self.max_tokens: int = t5.length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """T5's tokens of each prompt, the end mark included; above `max_tokens` the text would be cut."""
        return self.t5.count_tokens(prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """T5's states (B, max_tokens, D) and CLIP's pooled vector (B, P).

        Each distinct text runs alone, so that its bits never depend on the texts beside it.
        """
        move_modules((self.text_encoder, self.t5.encoder), self.device)
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def release_text_encoders(self) -> None:
        """Put the text encoders into main memory until the next text is to be encoded."""
        move_modules((self.text_encoder, self.t5.encoder), torch.device("cpu"))

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            pooled = self.text_encoder(tokens.input_ids.to(self.device)).pooler_output
        return Conditioning({"t5_states": self.t5.encode(prompt)[0], "pooled_projections": pooled})

    def encode_images(self, images: Tensor) -> Tensor:
        return encode_with(self.vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        height, width = x_t.shape[-2:]
        states = conditioning.tensors["t5_states"].to(self.device, self.dtype)
        guidance = None
        if self.guidance_embedding is not None:
            guidance = torch.full((len(x_t),), self.guidance_embedding, device=self.device)
        velocity = self.weights.network(
            hidden_states=packed(x_t.to(self.device, self.dtype)),
            # In half precision the pipeline rounds the timestep before it divides by 1000; the network
            # multiplies again.
            timestep=self.path.timestep(t).to(self.device, self.dtype) / 1000,
            guidance=guidance,
            pooled_projections=conditioning.tensors["pooled_projections"].to(self.device, self.dtype),
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=image_positions(height, width, self.device).to(self.dtype),
            return_dict=False,
        )[0]
        return unpacked(velocity, height, width).to(x_t.dtype)


def packed(latents: Tensor) -> Tensor:
    """Latents (B,C,h,w) as tokens (B, h/2 w/2, 4C) of 2 x 2 latents each, row by row; within a token the
    channel is slowest.

    Source: FLUX.1's sampling code; diffusers' `FluxPipeline`.
    """
    rows, channels, height, width = latents.shape
    blocks = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // PATCH**2, channels * PATCH**2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: tokens (B, h/2 w/2, 4C) as latents (B,C,h,w)."""
    rows, _, channels = tokens.shape
    blocks = tokens.reshape(rows, height // PATCH, width // PATCH, channels // PATCH**2, PATCH, PATCH)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels // PATCH**2, height, width)


def image_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(h/2 w/2, 3) float32: 0, row and column of each token; the rotary embedding turns by them. Texts stand
    at 0."""
    rows, columns = (torch.arange(side // PATCH, device=device) for side in (height, width))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).to(torch.float32)


def load(
    folder: ModelFolder,
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
) -> FluxPolicy:
    """Load a FluxPipeline folder by components (image encoder and feature extractor are left out)."""
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    refuse_drop_t5(folder, model)
    # Refused before anything is loaded; the shift is known once the picture's size is.
    read_flow_path(folder, image_tokens=1)
    files = [
        file
        for component in ("text_encoder", "text_encoder_2", "transformer", "vae")
        for file in weight_files(component_folder(folder, component), folder.variant)
    ]
    check_weight_files(files)
    tokenizer = load_tokenizer(folder, "tokenizer")
    length = read_sequence_length(folder, model, T5_TOKENS)
    text_encoder = load_module(CLIPTextModel, folder, "text_encoder", dtype, device)
    t5 = load_t5(folder, ("text_encoder_2", "tokenizer_2"), length, dtype, device)
    transformer = load_module(FluxTransformer2DModel, folder, "transformer", dtype, device)
    vae = load_module(AutoencoderKL, folder, "vae", torch.float32, device)
    _check_fit(folder, transformer, vae, text_encoder, t5)
    size = latent_size(_own_side(folder, vae), vae, str(folder.path), model.resolution, PATCH)
    image_tokens = size[0] * size[1] // PATCH**2
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return FluxPolicy(
        folder=folder,
        # The pipeline gives its scheduler a list that ends at 1 / steps.
        path=read_flow_path(folder, image_tokens, "steps"),
        weights=make_weights(transformer, with_targets(tuning, FLUX_LORA_TARGETS), seed),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        t5=t5,
        latent_shape=(vae.config.latent_channels, *size),
        guidance_embedding=model.guidance_embedding if transformer.config.guidance_embeds else None,
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
    )


def _own_side(folder: ModelFolder, vae: AutoencoderKL) -> int:
    """Side of the checkpoint's own pictures in latents."""
    pixels = read_json(folder.path / "vae" / "config.json").get("sample_size")
    return pixels // vae_factor(vae) if isinstance(pixels, int) else LATENT_SIDE


def _check_fit(
    folder: ModelFolder,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    t5: T5Text,
) -> None:
    """Raise PolicyError unless the transformer takes what the others give."""
    config = transformer.config
    token = PATCH**2 * vae.config.latent_channels
    if (config.in_channels, transformer.proj_out.out_features) != (token, token):
        raise PolicyError(
            f"{folder.path}: the transformer takes {config.in_channels} and gives "
            f"{transformer.proj_out.out_features} channels a "
            f"token, 2 x 2 latents of the autoencoder are {token}; expected all equal (filling and editing "
            f"models are not "
            "supported)"
        )
    given = (text_encoder.config.hidden_size, t5.encoder.config.d_model)
    taken = (config.pooled_projection_dim, config.joint_attention_dim)
    if given != taken:
        raise PolicyError(
            f"{folder.path}: the text encoders give pooled {given[0]} and states {given[1]}, the transformer "
            f"takes {taken[0]} and "
            f"{taken[1]}; the components belong to different models"
        )
