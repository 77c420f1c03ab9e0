"""Averages two bases: where one was trained on from the other, the mean of their weights often has what both
have learned (Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

TRAINED = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


EMBEDDING = "token_embedding.weight"


def average_bases(first: Path, second: Path, share: float, out: Path) -> None:
    """Write a base with the weights (1 - share) first + share second; all else is the second one's.

    Words are told apart by their tokens: the two vocabularies may number them differently.

    Raises:
        KeyError: one of them lacks a weight. RuntimeError: a weight has another shape.
    """
    shutil.copytree(second, out, dirs_exist_ok=True)
    old, new = (CLIPTokenizer.from_pretrained(base / "tokenizer").get_vocab() for base in (first, second))
    for name in TRAINED:
        one, other = load_file(first / name), load_file(second / name)
        mean = {}
        for key, theirs in other.items():
            ours = renumbered(one[key], old, new) if key.endswith(EMBEDDING) else one[key]
            mean[key] = torch.lerp(ours.float(), theirs.float(), share).to(theirs.dtype)
        save_file(mean, out / name, metadata={"format": "pt"})


def renumbered(rows: Tensor, old: dict[str, int], new: dict[str, int]) -> Tensor:
    """The rows of tokens in the order of another vocabulary; a token that only that one has keeps its row."""
    out = rows.clone()
    for token, row in new.items():
        out[row] = rows[old.get(token, row)]
    return out
