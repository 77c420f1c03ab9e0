"""A small store to read from, and a small exact policy: pictures are latents laid out, texts are their
letters.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffexpo.data.store import Store
from diffexpo.rng import numpy_generator
from diffexpo.types import Conditioning
from tests.rows import latent_list, pair_row, sample_row


class LetterPolicy:
    """3 x 8 x 8 latents are the picture itself in [-1, 1]; an embedding is the text's first eight letters."""

    latent_shape = (3, 8, 8)
    device = torch.device("cpu")
    fingerprint = "letters"

    def __init__(self) -> None:
        self.encoded_texts: list[str] = []
        self.encoded_images = 0

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.encoded_texts += prompts
        rows = [[ord(letter) for letter in text[:8].ljust(8)] for text in prompts]
        return Conditioning({"letters": torch.tensor(rows, dtype=torch.float32)})

    def encode_images(self, images: Tensor) -> Tensor:
        self.encoded_images += len(images)
        return images * 2 - 1

    def decode_latents(self, latents: Tensor) -> Tensor:
        return ((latents + 1) / 2).clamp(0, 1)


@pytest.fixture
def policy() -> LetterPolicy:
    return LetterPolicy()


def fill(store: Store, iteration: int, count: int, *, complete: bool = True, **pair_columns: object) -> None:
    """`count` pairs of one collection: samples <iteration>w<k> (explored) and <iteration>l<k> (main), four
    pairs a unit.
    """
    for unit, start in enumerate(range(0, count, 4)):
        names = [f"{iteration}{role}{k}" for k in range(start, min(start + 4, count)) for role in "wl"]
        rows = [sample_row(n, f"prompt {n[2:]}", "exploration" if "w" in n else "main") for n in names]
        store.append_unit(iteration, 0, unit, rows, latent_list(names))
    pairs = [
        pair_row(
            f"pair {iteration} {k}", f"{iteration}w{k}", f"{iteration}l{k}", f"prompt {k}",
            explored_id=f"{iteration}w{k}", main_id=f"{iteration}l{k}", **pair_columns,
        )
        for k in range(count)
    ]  # fmt: skip
    store.append_pairs(iteration, 0, pairs)
    if complete:
        store.write_manifest("collect", iteration, {})
        store.write_manifest("pair", iteration, {"pairs/count": count})


def jpeg(*name: str | int, size: tuple[int, int] = (8, 8)) -> bytes:
    pixels = numpy_generator("picture", *name).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def vote(number: int, label: float = 1.0, **more: object) -> dict[str, object]:
    row = {
        "caption": f"prompt {number}", "jpg_0": jpeg(number, 0), "jpg_1": jpeg(number, 1), "label_0": label,
        "label_1": 1.0 - label, "has_label": True, "are_different": True, "model_0": "one", "model_1": "two",
        "image_0_uid": f"uid {number} 0", "image_1_uid": f"uid {number} 1", "user_id": 7, "ranking_id": number,
    }  # fmt: skip
    return row | more


@pytest.fixture
def write_votes(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[dict[str, object]], name: str = "votes.parquet") -> Path:
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path

    return write
