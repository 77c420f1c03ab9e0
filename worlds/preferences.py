"""Preference sets of generated images: planned by key, labelled by a judge with noise, written in the columns
of Pick-a-Pic v2."""

from __future__ import annotations

import datetime
import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
from PIL import Image
from pyarrow import parquet

from diffexpo.types import Prompt
from diffexpo.worlds.keyed import keyed_fraction

IMAGES_A_PROMPT = 3  # every two of them are a pair
JPEG_QUALITY = 85
CREATED_AT = datetime.datetime(2026, 11, 21)
_COLUMNS = arrow.schema(
    [
        ("are_different", arrow.bool_()),
        ("best_image_uid", arrow.string()),
        ("caption", arrow.string()),
        ("created_at", arrow.timestamp("s")),
        ("has_label", arrow.bool_()),
        ("image_0_uid", arrow.string()),
        ("image_0_url", arrow.string()),
        ("image_1_uid", arrow.string()),
        ("image_1_url", arrow.string()),
        ("jpg_0", arrow.binary()),
        ("jpg_1", arrow.binary()),
        ("label_0", arrow.float64()),
        ("label_1", arrow.float64()),
        ("model_0", arrow.string()),
        ("model_1", arrow.string()),
        ("ranking_id", arrow.int64()),
        ("user_id", arrow.int64()),
        ("num_example_per_prompt", arrow.int64()),
        ("__index_level_0__", arrow.int64()),
    ]
)


@dataclass(frozen=True)
class Planned:
    """One image to draw: its key, what it shows, and who draws it how."""

    key: str
    caption: str
    source: str
    steps: int
    guidance: float

    @property
    def model(self) -> str:
        """What the set says of its origin."""
        return f"{self.source}/steps={self.steps}/guidance={self.guidance:g}"


@dataclass(frozen=True)
class LabelNoise:
    """How labels leave the judge: `ties` is the share of pairs, the closest, that are ties (0.5), and `flips`
    the expected share of the decided labels that contradict the judge."""

    flips: float
    ties: float


def plan_images(
    prompts: Sequence[Prompt],
    shares: Mapping[str, float],
    steps: Sequence[int],
    guidances: Sequence[float],
    name: str = "offline",
) -> list[Planned]:
    """Choose source, steps and guidance of `IMAGES_A_PROMPT` images of each prompt by keyed hashes.

    Args:
        shares: how often each named source draws, summing to 1.
        steps, guidances: settings that are drawn alike often.
        name: first part of the images' keys.
    """
    plan = []
    for prompt, index in itertools.product(prompts, range(IMAGES_A_PROMPT)):
        key = f"{name}/{prompt.id}/{index}"
        draw, total = keyed_fraction("source", key), 0.0
        for source in shares:
            total += shares[source]
            if draw < total:
                break
        chosen = steps[int(keyed_fraction("steps", key) * len(steps))]
        guidance = guidances[int(keyed_fraction("guidance", key) * len(guidances))]
        plan.append(Planned(key, prompt.text, source, chosen, guidance))
    return plan


def draw_planned(plan: Sequence[Planned], draw: Callable[[Sequence[Planned]], np.ndarray]) -> np.ndarray:
    """Return the planned images as uint8 (N, 64, 64, 3); `draw` is given those of one source and setting."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(plan):
        groups.setdefault(item.model, []).append(index)
    images = np.zeros((len(plan), 64, 64, 3), dtype=np.uint8)
    for _, mine in sorted(groups.items()):
        images[mine] = draw([plan[index] for index in mine])
    return images


def flip_temperature(gaps: np.ndarray, share: float) -> float:
    """Return the temperature at which mean(sigmoid(-|gap| / temperature)) is `share` (bisection, 1e-6
    relative)."""
    low, high = 1e-6, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        scaled = np.clip(np.abs(gaps) / middle, 0, 700)
        low, high = (middle, high) if float((1 / (1 + np.exp(scaled))).mean()) < share else (low, middle)
    return low


def to_jpeg(image: np.ndarray) -> bytes:
    """The file of an image (H, W, 3) of uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def from_jpeg(data: bytes) -> np.ndarray:
    """The image (H, W, 3) of uint8 that a reader of the set sees."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def label_pairs(
    plan: Sequence[Planned], files: Sequence[bytes], scores: np.ndarray, seed: int, noise: LabelNoise
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of all pairs, and the facts on how they were labelled.

    Image 0 wins with probability sigmoid((score_0 - score_1) / temperature) (Bradley-Terry); the temperature
    is set so that the expected share of flips is that of `noise`.

    Args:
        plan, files, scores: of all images, those of a prompt consecutive; scores (N,) of the judge.
        seed: names the noise.
    """
    pairs = [
        (start + a, start + b)
        for start in range(0, len(plan), IMAGES_A_PROMPT)
        for a, b in itertools.combinations(range(IMAGES_A_PROMPT), 2)
    ]
    gaps = np.array([scores[a] - scores[b] for a, b in pairs])
    tie = np.abs(gaps) <= np.quantile(np.abs(gaps), noise.ties)
    temperature = flip_temperature(gaps[~tie], noise.flips)
    rows, flips = [], 0
    for index, (a, b) in enumerate(pairs):
        chance = 1 / (1 + math.exp(-max(-700.0, min(700.0, gaps[index] / temperature))))
        wins = keyed_fraction("label", seed, plan[a].key, plan[b].key) < chance
        label = 0.5 if tie[index] else float(wins)
        flips += int(not tie[index] and wins != (gaps[index] > 0))
        ids = [hashlib.sha256(files[i]).hexdigest()[:32] for i in (a, b)]
        rows.append(
            {
                "are_different": bool(files[a] != files[b]),
                "caption": plan[a].caption,
                "created_at": CREATED_AT,
                "best_image_uid": "tie" if tie[index] else ids[0 if wins else 1],
                "has_label": True,
                "image_0_uid": ids[0],
                "image_1_uid": ids[1],
                "image_0_url": "",
                "image_1_url": "",
                "jpg_0": files[a],
                "jpg_1": files[b],
                "label_0": label,
                "label_1": 1 - label,
                "model_0": plan[a].model,
                "model_1": plan[b].model,
                "ranking_id": index,
                "user_id": 0,
                "num_example_per_prompt": len(pairs) * IMAGES_A_PROMPT // len(plan),
                "__index_level_0__": index,
            }
        )
    return rows, {"temperature": temperature, "flips": flips, "ties": int(tie.sum())}


def write_pairs(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], out: Path) -> None:
    """Write a set as one Parquet file; its schema's metadata holds the facts as JSON, under "diffexpo"."""
    table = arrow.Table.from_pylist(list(rows), schema=_COLUMNS)
    table = table.replace_schema_metadata({"diffexpo": json.dumps(facts)})
    out.parent.mkdir(parents=True, exist_ok=True)
    # Dictionary pages hold each image once a column, though two of three pairs share it.
    parquet.write_table(table, out, compression="zstd", dictionary_pagesize_limit=1 << 25)
