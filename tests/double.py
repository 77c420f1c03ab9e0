"""Toy policies, their noise and their batches in float64, where an identity shows to twelve digits on any
processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_double() -> Iterator[None]:
    """Inside the block new tensors, and so noise, latents, embeddings and weights, are float64."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
