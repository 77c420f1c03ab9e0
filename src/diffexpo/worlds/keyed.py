"""Choices that depend on names alone, so that every machine makes the same ones."""

from __future__ import annotations

import hashlib


def keyed_fraction(*names: object) -> float:
    """Return a number in [0, 1) that depends on the names alone: the first 8 bytes of their SHA-256."""
    digest = hashlib.sha256("/".join(str(name) for name in names).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
