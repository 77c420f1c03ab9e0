"""The torch side of the data: text embeddings kept once per prompt, and images to latents and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexpo.data.draws import positions_by
from diffexpo.data.prompt_bank import PromptBank
from diffexpo.types import Conditioning, HasBuckets, HoldsTextEncoders, MixedRows, Policy

Size = tuple[int, int]


class PromptEmbeddings:
    """Embeddings of prompts, each encoded alone, so that it does not depend on which texts it was batched
    with: a resumed run and a run in several processes see the same bits.

    Args:
        policy: Its `encode_prompts` is frozen and deterministic.
        prompts: Texts to encode now; others are encoded when they are first asked for.
        max_bytes: Memory the embeddings may take; the least recently used ones make room and are read, or
            encoded, again on demand.
        bank: Where `add` puts embeddings; None: in memory, as many as fit.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Iterable[str] = (),
        *,
        max_bytes: int = 2 * 2**30,
        bank: PromptBank | None = None,
    ) -> None:
        self._policy = policy
        self._max_bytes = max_bytes
        self._bank = bank
        self._bytes = self._num_encoded = 0
        self._rows: dict[str, Conditioning] = {}
        self.add(prompts)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, prompts: Iterable[str]) -> None:
        """Encode the texts that are not there yet: all of them into the bank, which every process calls with
        the same texts; without one while they fit, and more than that is left to `select`.

        Afterwards the policy's text encoders make room on the device.
        """
        texts = list(dict.fromkeys(prompts))
        if self._bank is not None:
            self._bank.add(texts, self._encode)
        for text in texts if self._bank is None else ():
            if self._bytes >= self._max_bytes:
                return
            self._row(text)
        self._release()

    def select(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning of B texts in order (repeats allowed), on the CPU."""
        asked = self._num_encoded
        rows = {text: self._row(text) for text in dict.fromkeys(texts)}
        if self._bank is not None and self._num_encoded > asked:
            self._release()
        return Conditioning.concatenate([rows[text] for text in texts])

    def _row(self, text: str) -> Conditioning:
        row = self._rows.pop(text, None)
        if row is None:
            row = (self._bank.read(text) if self._bank is not None else None) or self._encode(text)
            self._bytes += _bytes_of(row)
            while self._rows and self._bytes > self._max_bytes:
                self._bytes -= _bytes_of(self._rows.pop(next(iter(self._rows))))
        self._rows[text] = row  # last in the dict: used last
        return row

    def _encode(self, text: str) -> Conditioning:
        self._num_encoded += 1
        with torch.no_grad():
            return self._policy.encode_prompts([text]).to("cpu")

    def _release(self) -> None:
        if isinstance(self._policy, HoldsTextEncoders):
            self._policy.release_text_encoders()


def latent_shapes(policy: Policy) -> tuple[tuple[int, int, int], ...]:
    """Shapes of the latents of a run's images, the first is `policy.latent_shape`; one unless the model has
    buckets."""
    return policy.latent_shapes if isinstance(policy, HasBuckets) else (policy.latent_shape,)


def image_sizes(policy: Policy) -> tuple[Size, ...]:
    """(height, width) of the images of each shape of `latent_shapes`, found by decoding one zero latent."""
    with torch.no_grad():
        image = policy.decode_latents(torch.zeros(1, *policy.latent_shape))
    height, width = int(image.shape[-2]), int(image.shape[-1])
    first, *others = latent_shapes(policy)
    scale = height // first[1], width // first[2]
    return (height, width), *((shape[1] * scale[0], shape[2] * scale[1]) for shape in others)


def stacked(parts: Sequence[np.ndarray] | Sequence[Tensor]) -> Tensor:
    """Arrays of one shape each as the rows of a batch: `MixedRows` where there are several shapes, which only
    the whole batch of a step holds, never what a loss sees.
    """
    tensors = [part if isinstance(part, Tensor) else torch.from_numpy(part) for part in parts]
    mixed: Any = tensors[0] if len(tensors) == 1 else MixedRows(tuple(tensors))
    return mixed


def host_array(tensor: Tensor) -> np.ndarray:
    """What was computed on any device as an array in main memory, of the same numbers and type: the one wait
    for the device in drawing a unit of images."""
    return tensor.detach().cpu().numpy()


def encode_images(policy: Policy, images: Sequence[np.ndarray], batch_size: int) -> list[np.ndarray]:
    """uint8 images (H,W,3), of several sizes or one, to float32 latents (C,h,w) each; those of a size are
    encoded together in batches."""
    found: dict[int, np.ndarray] = {}
    for places in positions_by(images, lambda image: image.shape):
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            pixels = torch.from_numpy(np.stack([images[place] for place in part])).permute(0, 3, 1, 2)
            with torch.no_grad():
                latents = policy.encode_images(pixels.float() / 255)
            found |= zip(part, host_array(latents.float()), strict=True)
    return [found[place] for place in range(len(images))]


def pixel_decoder(policy: Policy, batch_size: int = 16) -> Callable[[np.ndarray], np.ndarray]:
    """A function from latents (N,C,h,w) to uint8 images (N,H,W,3), e.g. for `export_pairs`."""

    def decode(latents: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(latents), batch_size):
            part = torch.from_numpy(latents[start : start + batch_size])
            with torch.no_grad():
                images = policy.decode_latents(part)
            rounded = (images.float().clamp(0, 1) * 255).round().byte()
            parts.append(host_array(rounded.permute(0, 2, 3, 1)))
        return np.concatenate(parts)

    return decode


def _bytes_of(row: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in row.tensors.values())
