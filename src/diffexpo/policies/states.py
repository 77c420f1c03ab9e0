"""Versions of weights as named tensors: their names, and how they are compared and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

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


def unknown_version(name: str, names: Iterable[str]) -> PolicyError:
    """The error that names the versions there are."""
    return PolicyError(f"weights {name!r}: no such version; expected one of {', '.join(names)}")


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refuse_base(name: str) -> None:
    """Raise PolicyError if "base" is to be changed."""
    if name == BASE:
        raise PolicyError("weights 'base': never changes; write to another version")


class StandIn:
    """What both kinds of weight sets share: one version may stand in for all others for a while."""

    _stand_in: str | None = None

    @contextmanager
    def standing_in(self, name: str) -> Iterator[None]:
        """Inside the block `use` runs this version whatever name it is given."""
        previous, self._stand_in = self._stand_in, name
        try:
            yield
        finally:
            self._stand_in = previous
