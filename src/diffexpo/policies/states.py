"""Versions of weights as named tensors: their names, and how they are compared and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffexpo.errors import PolicyError

CURRENT, BASE, REFERENCE = "current", "base", "reference"


def check_state(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Names and shapes must match exactly."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise PolicyError(
            f"weights {name!r}: {len(missing)} tensors missing (first: {missing[:1]}), {len(unknown)} "
            f"unknown (first: {unknown[:1]}); expected the {len(own)} names of this model's trainable weights"
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise PolicyError(
                f"weights {name!r}: {key} has shape {tuple(state[key].shape)}, expected "
                f"{tuple(tensor.shape)}; the file belongs to another model or LoRA rank"
            )


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Versions:
    """What both kinds of weight sets share. One version may stand in for all others for a while."""

    _versions: dict[str, Any]
    _stand_in: str | None = None

    def names(self) -> list[str]:
        return sorted(self._versions)

    @contextmanager
    def standing_in(self, name: str) -> Iterator[None]:
        """Inside the block `use` runs this version whatever name it is given."""
        previous, self._stand_in = self._stand_in, name
        try:
            yield
        finally:
            self._stand_in = previous

    def _check_known(self, name: str) -> None:
        if name not in self._versions:
            known = ", ".join(self.names())
            raise PolicyError(f"weights {name!r}: no such version; expected one of {known}")

    def _refuse_change(self, name: str) -> None:
        if name == BASE:
            raise PolicyError("weights 'base': never changes; write to another version")

    def _refuse_drop(self, name: str, running: str) -> None:
        self._check_known(name)
        self._refuse_change(name)
        if name in (CURRENT, running):
            raise PolicyError(f"weights {name!r}: in use, cannot be dropped")
