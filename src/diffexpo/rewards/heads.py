"""Heads of scorers: stacks of linear maps that turn a vector into one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Places of the linear maps in LAION's and ImageReward's stacks; between them are only dropouts, idle here.
STACK = (0, 2, 4, 6, 7)


def apply_stack(vectors: Tensor, stack: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Numbers (B,) of vectors (B, D): consecutive linear maps (weight, bias), the last with one row.

    Of (1, 2) under one map with weight (3, 4) and bias 5: 16.
    """
    for weight, bias in stack:
        vectors = torch.nn.functional.linear(vectors, weight, bias)
    return vectors[:, 0]


def read_stack(tensors: Mapping[str, Tensor], prefix: str) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each map `{prefix}{place}`, float32."""
    return [
        (tensors[f"{prefix}{place}.weight"].float(), tensors[f"{prefix}{place}.bias"].float())
        for place in STACK
    ]
