"""Versions of weights as named tensors: their names, and how they are compared and checked."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


class Versions(ABC):
    """What both kinds of weight sets share: versions by name, of which one runs, and one may stand in for all
    others for a while."""

    _versions: dict[str, Any]
    _active: str = CURRENT
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

    def drop(self, name: str) -> None:
        """Forget a version; "reference" falls back to the base."""
        self._known(name)
        self._refuse_change(name)
        if name in (CURRENT, self._active):
            raise PolicyError(f"weights {name!r}: in use, cannot be dropped")
        self._remove(name)
        if name == REFERENCE:
            self._versions[REFERENCE] = self._versions[BASE]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of "current" by name, e.g. `mid_block...to_q.lora_A.weight`."""
        return self._parameters(self._versions[CURRENT])

    def state(self, name: str) -> dict[str, Tensor]:
        """Detached CPU copy of a version."""
        # Contiguous, whatever the layout in memory: files take no other.
        return {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self._tensors(name).items()
        }

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Make or overwrite a version from tensors whose names and shapes match exactly."""
        self._refuse_change(name)
        check_state(name, state, self.trainable())
        parameters = self._parameters(self._writable(name))
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(state[key])

    def follow(self, name: str, source: str, memory: float) -> None:
        """Move a version towards another one, name <- memory name + (1 - memory) source, on the device: this
        happens in every step, and whole weights are not to pass through main memory."""
        self._refuse_change(name)
        ahead, behind = self._tensors(source), self._tensors(name)
        parameters = self._parameters(self._writable(name))
        with torch.no_grad():
            for key, parameter in parameters.items():
                value = ahead[key].detach()
                parameter.copy_(torch.lerp(value, behind[key].detach().to(value), memory))

    def fingerprint(self, name: str) -> str:
        """sha256 of a version's values."""
        return fingerprint_state(self.state(name))

    def _known(self, name: str) -> Any:
        """What `_versions` holds of a version."""
        if name not in self._versions:
            known = ", ".join(self.names())
            raise PolicyError(f"weights {name!r}: no such version; expected one of {known}")
        return self._versions[name]

    def _refuse_change(self, name: str) -> None:
        if name == BASE:
            raise PolicyError("weights 'base': never changes; write to another version")

    @abstractmethod
    def _parameters(self, version: Any) -> dict[str, nn.Parameter]:
        """Trained parameters of what `_versions` holds."""

    @abstractmethod
    def _tensors(self, name: str) -> Mapping[str, Tensor]:
        """The values of a version."""

    @abstractmethod
    def _writable(self, name: str) -> Any:
        """A version to write to, made if there is none of its own."""

    def _remove(self, name: str) -> None:
        """Forget a version, if there is one."""
        self._versions.pop(name, None)
