"""HPS v2 and v2.1: an OpenCLIP ViT-H/14 checkpoint, run by transformers."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from diffexpo.config.rewards import REWARDS
from diffexpo.config.rewards.hps import HpsCard
from diffexpo.errors import RewardError
from diffexpo.rewards.dual_encoder import (
    SETTINGS_FILES,
    UNITS,
    DualEncoder,
    read_clip_config,
    read_tokenizer,
)
from diffexpo.rewards.images import longest_side_pad
from diffexpo.rewards.weights import (
    fill,
    find_folder,
    find_weights,
    fingerprint,
    read_tensors,
    settings_files,
)

# OpenCLIP name -> CLIPModel name. Projections are stored transposed there, and query, key and value as one
# matrix.
_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


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
        folder = find_folder(name, base, key="base", patterns=SETTINGS_FILES, expected=HpsCard.base_is)
        config, tokenizer = read_clip_config(name, folder), read_tokenizer(name, folder)
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
        settings = {"scale": scale, "precision": precision, "edition": edition}
        self.version = fingerprint([file, *settings_files(folder)], settings)


def clean_text(text: str) -> str:
    """HTML entities resolved twice and ends stripped, as OpenCLIP's tokenizer does first."""
    return html.unescape(html.unescape(text)).strip()


def clip_state_dict(openclip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An OpenCLIP state dict under the names of a CLIPModel, float32.

    A fused `attn.in_proj_weight` (3W, W) becomes the weights of q_proj, k_proj and v_proj in this order, and
    the two projections are transposed. Unknown names stay as they are.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in openclip.items():
        if key != "attn_mask":  # a constant of the causal text tower, not a weight
            renamed |= _renamed(key, tensor.float())
    return renamed


def _renamed(key: str, tensor: Tensor) -> dict[str, Tensor]:
    if key in _TOP:
        return {_TOP[key]: tensor}
    if key in _PROJECTIONS:
        return {_PROJECTIONS[key]: tensor.T.contiguous()}
    stem, _, last = key.rpartition(".")
    if stem in _NORMS:
        return {f"{_NORMS[stem]}.{last}": tensor}
    match = _BLOCK.fullmatch(key)
    if match is None:
        return {key: tensor}
    tower, number, inner = match.groups()
    block = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}"
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{block}.self_attn.{part}_proj.{kind}": rows.contiguous() for part, rows in parts}
    stem, _, last = inner.rpartition(".")
    return {f"{block}.{_INSIDE.get(stem, stem)}.{last}": tensor}


def _load(name: str, file: Path, config: CLIPConfig) -> CLIPModel:
    openclip = read_tensors(name, file)
    activations = {config.text_config.hidden_act, config.vision_config.hidden_act}
    if activations != {"gelu"}:
        raise RewardError(
            f"reward {name!r}: base has activation {', '.join(sorted(activations))}; HPS stands on a CLIP "
            f"ViT-H/14 with gelu, set base={HpsCard.default_base}"
        )
    model = CLIPModel(config)
    fill(name, file, model, clip_state_dict(openclip), "HPS (of the base's sizes)")
    return model
