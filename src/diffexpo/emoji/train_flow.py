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

from diffexpo.emoji.fit import Average, autocast, choose_device, fit
from diffexpo.emoji.layout import save_flow
from diffexpo.emoji.models import FLOW_TEXT_WIDTHS, make_flow_text_encoders, make_flow_transformer
from diffexpo.emoji.tokens import make_tokenizer
from diffexpo.emoji.train_diffusion import (
    GROUNDING_SHARE,
    GROUNDING_WEIGHT,
    LatentDraws,
    TextGrounding,
    read_weights,
)

BATCH = 64
LEARNING_RATE = 1e-3
ABSENT_TOKENS = 256  # zero tokens that diffusers puts where the absent third text encoder would speak


class FoldedContextProcessor:
    """SD3's joint attention where the last context token stands for `ABSENT_TOKENS` equal ones.

    Equal tokens without positions stay equal in every layer, so the softmax over 256 of them is the softmax
    over one whose logits are raised by log(256): the same function at a quarter of the cost.
    """

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

        query, key, value = (
            split(attn.to_q(hidden_states)),
            split(attn.to_k(hidden_states)),
            split(attn.to_v(hidden_states)),
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        added_query = attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states)))
        added_key = attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states)))
        query = torch.cat([query, added_query], dim=2)
        key = torch.cat([key, added_key], dim=2)
        value = torch.cat([value, split(attn.add_v_proj(encoder_hidden_states))], dim=2)
        logits = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        bias = pad(torch.zeros(key.shape[2] - 1, device=key.device), (0, 1), value=math.log(ABSENT_TOKENS))
        joined = (
            ((logits + bias.to(logits.dtype)).softmax(dim=-1).to(value.dtype) @ value)
            .transpose(1, 2)
            .flatten(2)
        )
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


def train_flow(
    minutes: float,
    out: Path,
    seed: int,
    vae: AutoencoderKL,
    snapshot_minutes: float = 8.0,
    start: Path | None = None,
) -> None:
    """Train text encoders and transformer and save the StableDiffusion3Pipeline folder to `out`.

    The target is the velocity eps - x0 of x_t = (1 - t) x0 + t eps, with t = sigmoid of a standard normal.
    The text encoders are grounded first, and along the way, as the diffusion base's. `start`: go on from that
    folder's weights.
    """
    torch.manual_seed(seed)
    device = choose_device()
    tokenizer = make_tokenizer()
    data = LatentDraws(vae, seed + 1)
    first, second = make_flow_text_encoders(tokenizer)
    transformer = make_flow_transformer()
    if start is not None:
        first.load_state_dict(read_weights(start / "text_encoder" / "model.safetensors"))
        second.load_state_dict(read_weights(start / "text_encoder_2" / "model.safetensors"))
        weights = read_weights(start / "transformer" / "diffusion_pytorch_model.safetensors")
        transformer.load_state_dict(weights)
    encoders = (first.to(device), second.to(device))
    for encoder in encoders:
        encoder.set_attn_implementation("eager")
    transformer.to(device).set_attn_processor(FoldedContextProcessor())
    grounding = TextGrounding(2 * sum(FLOW_TEXT_WIDTHS)).to(device)
    text = nn.ModuleDict({"first": first, "second": second, "grounding": grounding})
    everything = nn.ModuleDict({"text": text, "transformer": transformer})

    def encode(captions: list[str], x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
            device
        )
        with autocast(device):
            context, pooled = encode_captions(encoders, tokenizer, captions)
            both = torch.cat([context[:, :-1], pooled.unsqueeze(1).expand(-1, ids.shape[1], -1)], dim=-1)
            guess = grounding(both, ids, tokenizer.eos_token_id)
        return context, pooled, (guess.float() - x0.to(device)).square().mean()

    def grounding_loss(progress: float) -> Tensor:
        x0, captions = data.draw(2 * BATCH)
        return encode(captions, x0)[2]

    def loss_of(progress: float) -> Tensor:
        x0, captions = data.draw(BATCH)
        eps = data.noise_like(x0)
        slices = (torch.arange(BATCH) + torch.rand(BATCH, generator=data.generator)) / BATCH
        normal = torch.special.ndtri(slices.clamp(1e-4, 1 - 1e-4))[
            torch.randperm(BATCH, generator=data.generator)
        ]
        t = torch.sigmoid(normal)
        share = t.view(-1, 1, 1, 1)
        x_t = (1 - share) * x0 + share * eps
        context, pooled, grounding_error = encode(captions, x0)
        with autocast(device):
            velocity = transformer(
                x_t.to(device),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=(t * 1000).to(device),
                return_dict=False,
            )[0]
        error = (velocity.float() - (eps - x0).to(device)).square().mean()
        return error + GROUNDING_WEIGHT * grounding_error

    def snapshot() -> None:
        save_flow(vae, encoders, tokenizer, transformer, out)

    alone = (
        GROUNDING_SHARE if start is None else 0.04
    )  # the head is not stored: with `start` it alone is learned anew
    fit(
        "flow text",
        grounding_loss,
        (text if start is None else grounding).parameters(),
        minutes=minutes * alone,
        learning_rate=1.5e-3,
        final=0.3,
    )
    fit(
        "flow",
        loss_of,
        everything.parameters(),
        minutes=minutes * (1 - alone),
        learning_rate=LEARNING_RATE * (1.0 if start is None else 0.6),
        averages=[Average(everything, 0.999)],
        snapshot=snapshot,
        snapshot_minutes=snapshot_minutes,
        warmup=0.04,
    )
