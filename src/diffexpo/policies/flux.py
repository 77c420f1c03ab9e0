"""Rectified-flow transformers in the FLUX.1 layout: dev, whose guidance is a number fed to the network, and
schnell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexpo.config.families.flux import CARD
from diffexpo.errors import PolicyError
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Shape, read_path
from diffexpo.policies.loading import ModelFolder, read_json
from diffexpo.policies.t5 import T5Text, load_t5, read_sequence_length
from diffexpo.policies.text import load_tokenizer, tokenize
from diffexpo.types import Conditioning

PATCH = CARD.patch
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

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    t5: T5Text
    guidance_embedding: float | None

    @property
    def sequence_length(self) -> int:
        """T5's full text reaches the network; CLIP's pooled vector covers only its beginning."""
        return self.t5.length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """T5's tokens of each prompt, the end mark included; above `max_tokens` the text would be cut."""
        return self.t5.count_tokens(prompts)

    def text_modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.t5.encoder]

    def encode_prompt(self, prompt: str) -> Conditioning:
        tokens = tokenize(self.tokenizer, prompt)
        with torch.no_grad():
            pooled = self.text_encoder(tokens.input_ids.to(self.device)).pooler_output
        return Conditioning({"t5_states": self.t5.encode(prompt)[0], "pooled_projections": pooled})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        height, width = x_t.shape[-2:]
        states = self.on_device(conditioning.tensors["t5_states"])
        guidance = None
        if self.guidance_embedding is not None:
            guidance = torch.full((len(x_t),), self.guidance_embedding, device=self.device)
        velocity = self.weights.network(
            hidden_states=packed(self.on_device(x_t)),
            # In half precision the pipeline rounds the timestep before it divides by 1000; the network
            # multiplies again.
            timestep=self.on_device(self.path.timestep(t)) / 1000,
            guidance=guidance,
            pooled_projections=self.on_device(conditioning.tensors["pooled_projections"]),
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


def load(ask: Loading) -> FluxPolicy:
    """Load a FluxPipeline folder by components (image encoder and feature extractor are left out)."""
    folder = ask.folder
    # Refused before anything is loaded; the shift is known once the image's size is.
    read_path(folder, "flow", image_tokens=1)
    files = ask.files()
    tokenizer = load_tokenizer(folder, "tokenizer")
    length = read_sequence_length(folder, ask.model, ask.card.text_tokens)
    text_encoder = ask.network("text_encoder")
    t5 = load_t5(ask, ("text_encoder_2", "tokenizer_2"), length)
    transformer, vae = ask.denoiser(), ask.autoencoder()
    _check_fit(ask.where, transformer, vae, text_encoder, t5)
    height, width = ask.latent_size(_own_side(folder, vae), transformer, vae)
    return ask.policy(
        FluxPolicy,
        files,
        transformer,
        # The pipeline gives its scheduler a list that ends at 1 / steps.
        path=read_path(folder, "flow", image_tokens=height * width // PATCH**2, lowest_level="steps"),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        t5=t5,
        latent_shape=(vae.config.latent_channels, height, width),
        guidance_embedding=ask.model.guidance_embedding if transformer.config.guidance_embeds else None,
    )


def _own_side(folder: ModelFolder, vae: AutoencoderKL) -> int:
    """Side of the checkpoint's own images in latents."""
    pixels = read_json(folder.path / "vae" / "config.json").get("sample_size")
    return pixels // vae_factor(vae) if isinstance(pixels, int) else LATENT_SIDE


def _check_fit(
    where: str,
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
            f"{where}: the transformer takes {config.in_channels} and gives "
            f"{transformer.proj_out.out_features} channels a token, 2 x 2 latents of the autoencoder are "
            f"{token}; expected all equal (filling and editing models are not supported)"
        )
    given = (text_encoder.config.hidden_size, t5.encoder.config.d_model)
    taken = (config.pooled_projection_dim, config.joint_attention_dim)
    if given != taken:
        raise PolicyError(
            f"{where}: the text encoders give pooled {given[0]} and states {given[1]}, the transformer takes "
            f"{taken[0]} and {taken[1]}; the components belong to different models"
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
