"""Records, batches and Protocols shared by all rooms. Imports without torch.

Three nouns: a **Policy** can denoise, a **Reward** can score, the **Store** remembers. Algorithms know policies, and the online
loop knows rewards, only through the Protocols below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffexpo.diffusion.path import Path as DiffusionPath


@dataclass(frozen=True)
class Prompt:
    """One prompt. `attributes` may hold what the text leaves out (e.g. {"occupation": "firefighter"})."""

    id: str
    text: str
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditioning:
    """What a policy's text side hands to its denoiser: named tensors whose first axis is the batch."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, index: Tensor | Sequence[int] | slice) -> Conditioning:
        """Rows by index (repeats allowed) or slice."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """The same rows on a device, floating tensors in `dtype`."""
        return Conditioning(
            {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in self.tensors.items()
            }
        )

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack batches behind each other; all must hold the same names."""
        import torch

        return Conditioning(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )


class WeightSets(Protocol):
    """Named versions of the trainable weights on one base.

    "current" is trained; "reference" is what the loss is measured against; "main", "exploration", "ema", "base" and others are
    versions by name. With LoRA a version is a named adapter on the frozen base and "base" is the base with adapters off;
    with full fine-tuning a version is a copy.
    """

    def names(self) -> list[str]: ...
    def use(self, name: str) -> AbstractContextManager[None]:
        """Inside the block `predict` runs with that version. Nestable; restores the previous one."""
        ...
    def copy(self, source: str, target: str) -> None:
        """Make or overwrite `target` with the values of `source` (exact)."""
        ...
    def drop(self, name: str) -> None: ...
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of "current" that are trained, by stable name."""
        ...
    def state(self, name: str) -> dict[str, Tensor]:
        """Detached CPU copy of a version, by the names of `trainable()`."""
        ...
    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Make or overwrite a version; names and shapes must match exactly."""
        ...
    def fingerprint(self, name: str) -> str:
        """SHA-256 over a version's names, shapes, types and bytes."""
        ...


class Policy(Protocol):
    """A text-to-image model that can denoise. `t` is a float in [0, 1], 1 is pure noise."""

    path: DiffusionPath
    weights: WeightSets
    latent_shape: tuple[int, int, int]
    device: torch.device
    fingerprint: str

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning: ...
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w), posterior mean."""
        ...
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B,C,h,w) to float32 images (B,3,H,W) in [0,1]."""
        ...
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own prediction (eps, v, x0 or velocity) for x_t (B,C,h,w) at t (B,)."""
        ...


class Reward(Protocol):
    """Scores images. Higher is better; images float32 (B,3,H,W) in [0,1]; returns (B,) float32, NaN where scoring failed."""

    name: str
    version: str
    scale: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class PairBatch:
    """Winner and loser latents of B prompts; optionally a contrast pair (exploration sample, main sample) of E prompts.

    `weight` (B,) scales each pair's loss (1 by default). `uncertainty_winner/_loser` (B,) are the Gamma of the offset.
    `keys` name the pairs: the loss draws its noise and t from them, so a batch's split does not change them.
    """

    winner: Tensor
    loser: Tensor
    conditioning: Conditioning
    keys: tuple[str, ...]
    weight: Tensor | None = None
    uncertainty_winner: Tensor | None = None
    uncertainty_loser: Tensor | None = None
    explored: Tensor | None = None
    main: Tensor | None = None
    contrast_conditioning: Conditioning | None = None
    contrast_keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss to minimise and metrics: name -> (sum over samples, count), so that means are exact over any split."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, int]]


class Algorithm(Protocol):
    """One training method: a loss on a batch."""

    batch_type: type
    needs_reference: bool

    def loss(self, policy: Policy, batch: PairBatch, noise_key: tuple[str | int, ...]) -> LossOutput: ...


