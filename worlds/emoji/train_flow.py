"""Trains the rectified-flow base: two text encoders and an SD3 transformer together, on precomputed
latents."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from worlds.emoji.fit import autocast, choose_device
from worlds.emoji.layout import save_flow
from worlds.emoji.models import FLOW_TEXT_WIDTHS, make_flow_text_encoders, make_flow_transformer
from worlds.emoji.tokens import make_tokenizer
from worlds.emoji.train_diffusion import (
    GROUNDING_WEIGHT,
    LatentDraws,
    TextGrounding,
    fit_grounded,
    read_weights,
    shuffled,
    stratified,
)

BATCH = 64
ABSENT_TOKENS = 256  # zero tokens that diffusers puts in place of the absent third text encoder's


class FoldedContextProcessor:
    """SD3's joint attention where the last context token stands for `num_equal` equal ones.

    Equal tokens without positions stay equal in every layer, so the softmax over 256 of them is the softmax
    over one whose logits are raised by log(256): the same function at a quarter of the cost.
    """

    def __init__(self, num_equal: int = ABSENT_TOKENS) -> None:
        self.num_equal = num_equal

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's outputs for the image tokens and for the context tokens."""
        num_image = hidden_states.shape[1]

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = attn.norm_q(split(attn.to_q(hidden_states)))
        key = attn.norm_k(split(attn.to_k(hidden_states)))
        value = split(attn.to_v(hidden_states))
        added_query = attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states)))
        added_key = attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states)))
        query = torch.cat([query, added_query], dim=2)
        key = torch.cat([key, added_key], dim=2)
        value = torch.cat([value, split(attn.add_v_proj(encoder_hidden_states))], dim=2)
        logits = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        bias = pad(torch.zeros(key.shape[2] - 1, device=key.device), (0, 1), value=math.log(self.num_equal))
        weights = (logits + bias.to(logits.dtype)).softmax(dim=-1).to(value.dtype)
        joined = (weights @ value).transpose(1, 2).flatten(2)
        image, context = joined[:, :num_image], joined[:, num_image:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def encode_captions(
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    captions: list[str],
) -> tuple[Tensor, Tensor]:
    """Return context (B, 24 + 1, D) and pooled (B, P) as diffusers makes them, the absent encoder's tokens
    folded in one."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids = tokens.input_ids.to(encoders[0].device)
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return pad(states, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)


class _FlowModels:
    """The text encoders, the transformer and the grounding head, with the losses that they are trained on."""

    def __init__(self, vae: AutoencoderKL, seed: int, start: Path | None) -> None:
        self.device = choose_device()
        self.tokenizer = make_tokenizer()
        self.data = LatentDraws(vae, seed + 1)
        first, second = make_flow_text_encoders(self.tokenizer)
        self.transformer = make_flow_transformer()
        if start is not None:
            first.load_state_dict(read_weights(start / "text_encoder" / "model.safetensors"))
            second.load_state_dict(read_weights(start / "text_encoder_2" / "model.safetensors"))
            weights = read_weights(start / "transformer" / "diffusion_pytorch_model.safetensors")
            self.transformer.load_state_dict(weights)
        self.encoders = (first.to(self.device), second.to(self.device))
        for encoder in self.encoders:
            encoder.set_attn_implementation("eager")
        self.transformer.to(self.device).set_attn_processor(FoldedContextProcessor())
        self.grounding = TextGrounding(2 * sum(FLOW_TEXT_WIDTHS)).to(self.device)
        text = nn.ModuleDict({"first": first, "second": second, "grounding": self.grounding})
        self.parts = nn.ModuleDict({"text": text, "transformer": self.transformer})

    def encode(self, captions: list[str], x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return context, pooled text and the error of the grounding head's guess of x0."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.device)
        with autocast(self.device):
            context, pooled = encode_captions(self.encoders, self.tokenizer, captions)
            both = torch.cat([context[:, :-1], pooled.unsqueeze(1).expand(-1, ids.shape[1], -1)], dim=-1)
            guess = self.grounding(both, ids, self.tokenizer.eos_token_id)
        return context, pooled, (guess.float() - x0.to(self.device)).square().mean()

    def grounding_loss(self, progress: float) -> Tensor:
        """Return the error of the grounding head on a new batch."""
        x0, captions = self.data.draw(2 * BATCH)
        return self.encode(captions, x0)[2]

    def loss(self, progress: float) -> Tensor:
        """Return the velocity error on a new batch, with the grounding as a small second loss."""
        x0, captions = self.data.draw(BATCH)
        eps = self.data.noise_like(x0)
        slices = stratified(BATCH, self.data.generator).clamp(1e-4, 1 - 1e-4)
        t = torch.sigmoid(shuffled(torch.special.ndtri(slices), self.data.generator))
        share = t.view(-1, 1, 1, 1)
        x_t = (1 - share) * x0 + share * eps
        context, pooled, grounding_error = self.encode(captions, x0)
        with autocast(self.device):
            velocity = self.transformer(
                x_t.to(self.device),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=(t * 1000).to(self.device),
                return_dict=False,
            )[0]
        error = (velocity.float() - (eps - x0).to(self.device)).square().mean()
        return error + GROUNDING_WEIGHT * grounding_error


def train_flow(minutes: float, out: Path, seed: int, vae: AutoencoderKL, start: Path | None = None) -> None:
    """Train text encoders and transformer and save the StableDiffusion3Pipeline folder to `out`.

    The target is the velocity eps - x0 of x_t = (1 - t) x0 + t eps, with t = sigmoid of a standard normal.
    The text encoders are grounded first, and along the way, as the diffusion base's. With `start` training
    continues from that folder's weights.
    """
    torch.manual_seed(seed)
    models = _FlowModels(vae, seed, start)
    fit_grounded(
        "flow",
        (models.grounding_loss, models.loss),
        models.parts,
        minutes,
        is_continued=start is not None,
        snapshot=lambda: save_flow(vae, models.encoders, models.tokenizer, models.transformer, out),
        warmup=0.04,
    )
