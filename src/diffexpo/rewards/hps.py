"""HPS v2 and v2.1: an OpenCLIP ViT-H/14 checkpoint, run by transformers."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffexpo.config.rewards import REWARDS
from diffexpo.config.rewards.hps import HpsCard
from diffexpo.errors import RewardError
from diffexpo.rewards.dual_encoder import UNITS, DualEncoder
from diffexpo.rewards.images import longest_side_pad
from diffexpo.rewards.weights import (
    fill,
    find_folder,
    find_weights,
    fingerprint,
    read_part,
    read_tensors,
    renamed,
)

# OpenCLIP name -> CLIPModel name.
_NAMES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    ".ln_": ".layer_norm",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


class HpsReward(DualEncoder):
    """cos(text, image) of the HPS checkpoints, by default times 100 as their benchmark prints it.

    `path` is the checkpoint's `state_dict` as safetensors (a file, a folder with one, or a hub id), `base` a
    folder or hub id with configuration and tokenizer of CLIP ViT-H/14, and `edition` says which file is
    meant, "hpsv2" or "hpsv2.1": the networks have one architecture.

    Raises:
        MissingError: weights, configuration or tokenizer are missing.
        RewardError: the file is damaged, or holds the weights of another model.
    Source: HPSv2 (arXiv 2306.09341) and its code's score function. Where we differ: an image whose longest
        side has the network's size already is padded too, antialiasing is always on, and broken encodings in
        prompts (mojibake) are not repaired.
    """

    def __init__(
        self,
        name: str,
        path: str | None,
        device: torch.device | str = "cpu",
        *,
        base: str,
        edition: str = "hpsv2.1",
        scale: str = "percent",
        precision: str = "float32",
    ) -> None:
        self.scale = f"{UNITS[scale]} ({edition})"
        file = find_weights(name, REWARDS[edition], path)
        folder = find_folder(name, base, HpsCard.base_is)
        config = read_part(name, folder, CLIPConfig)
        tokenizer = read_part(name, folder, CLIPTokenizer)
        super().__init__(
            name,
            _load(name, file, config),
            tokenizer,
            partial(longest_side_pad, size=int(config.vision_config.image_size)),
            device=device,
            precision=precision,
            unit=scale,
            clean=clean_text,
        )
        self.version = fingerprint([file], [folder], scale=scale, precision=precision, edition=edition)


def clean_text(text: str) -> str:
    """HTML entities resolved twice and ends stripped, as OpenCLIP's tokenizer does first."""
    return html.unescape(html.unescape(text)).strip()


def clip_state_dict(openclip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP state dict under the names of a CLIPModel, float32.

    A fused `attn.in_proj_weight` (3W, W) becomes the weights of q_proj, k_proj and v_proj in this order, and
    the two projections are transposed. Unknown names stay as they are.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in openclip.items():
        name = renamed(key, _NAMES)
        if ".attn.in_proj_" in key:
            for part, rows in zip("qkv", tensor.float().chunk(3), strict=True):
                found[name.replace(".in_proj_", f".{part}_proj.")] = rows.contiguous()
        elif key in ("visual.proj", "text_projection"):
            found[name] = tensor.float().T.contiguous()
        elif key != "attn_mask":  # a constant of the causal text tower, not a weight
            found[name] = tensor.float()
    return found


def _load(name: str, file: Path, config: CLIPConfig) -> CLIPModel:
    activations = {config.text_config.hidden_act, config.vision_config.hidden_act}
    if activations != {"gelu"}:
        advice = f"HPS stands on a CLIP ViT-H/14 with gelu, set base={HpsCard.default_base}"
        raise RewardError(f"reward {name!r}: base has activation {', '.join(sorted(activations))}; {advice}")
    return fill(
        name, file, CLIPModel(config), clip_state_dict(read_tensors(name, file)), "HPS (of the base's sizes)"
    )
