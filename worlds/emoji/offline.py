"""Makes the offline preference set: pairs of generated images, labelled by the training judge with
noise."""

from __future__ import annotations

import datetime
import hashlib
import io
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import torch
from PIL import Image
from pyarrow import parquet
from transformers import CLIPModel, CLIPTokenizer

from diffexpo.types import Prompt
from diffexpo.worlds.emoji import asset_path, keyed_fraction, train_prompts
from worlds.emoji.draw import draw_images, load_pipeline, to_float
from worlds.emoji.train_judge import embed_images, embed_texts

IMAGES_A_PROMPT = 3  # every two of them are a pair
STEPS = (8, 12, 20)
GUIDANCES = (1.5, 3.0, 6.0)
FLIP_SHARE = 0.175  # of the decided labels, expected: sets the temperature of the Bradley-Terry noise
TIE_SHARE = 0.03  # the closest pairs are kept as ties
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


def flip_temperature(gaps: np.ndarray, share: float = FLIP_SHARE) -> float:
    """Return the temperature at which mean(sigmoid(-|gap| / temperature)) is `share` (bisection, 1e-6
    relative)."""
    low, high = 1e-6, 1e6
    for _ in range(100):
        middle = math.sqrt(low * high)
        scaled = np.clip(np.abs(gaps) / middle, 0, 700)
        low, high = (middle, high) if float((1 / (1 + np.exp(scaled))).mean()) < share else (low, middle)
    return low


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


@torch.no_grad()
def _judge_scores(folder: Path, images: np.ndarray, captions: list[str]) -> np.ndarray:
    judge = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    scale = judge.logit_scale.exp()
    parts = []
    for start in range(0, len(images), 128):
        seen = embed_images(judge, to_float(images[start : start + 128]))
        parts.append(scale * (seen * embed_texts(judge, tokenizer, captions[start : start + 128])).sum(-1))
    return torch.cat(parts).double().numpy()


def _plan(
    prompts: list[Prompt], sources: Mapping[str, Path], shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Choose source, steps and guidance of every image by keyed hashes."""
    plan = []
    for prompt in prompts:
        for index in range(IMAGES_A_PROMPT):
            key = f"offline/{prompt.id}/{index}"
            draw, total = keyed_fraction("source", key), 0.0
            for source in sources:
                total += shares[source]
                if draw < total:
                    break
            plan.append(
                {
                    "key": key,
                    "caption": prompt.text,
                    "source": source,
                    "steps": STEPS[int(keyed_fraction("steps", key) * len(STEPS))],
                    "guidance": GUIDANCES[int(keyed_fraction("guidance", key) * len(GUIDANCES))],
                }
            )
    return plan


def _draw(plan: list[dict[str, Any]], sources: Mapping[str, Path]) -> np.ndarray:
    """Return the planned images as uint8 (N, 64, 64, 3); equal settings are drawn in one batch."""
    images = np.zeros((len(plan), 64, 64, 3), dtype=np.uint8)
    for source, folder in sources.items():
        pipeline = load_pipeline(folder)
        for steps, guidance in itertools.product(STEPS, GUIDANCES):
            settings = (source, steps, guidance)
            mine = [
                index
                for index, item in enumerate(plan)
                if (item["source"], item["steps"], item["guidance"]) == settings
            ]
            if mine:
                captions, keys = ([plan[index][name] for index in mine] for name in ("caption", "key"))
                images[mine] = draw_images(pipeline, captions, keys, steps=steps, guidance=guidance)
    return images


def _label(
    plan: list[dict[str, Any]], files: list[bytes], scores: np.ndarray, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of all pairs, and the facts on how they were labelled."""
    pairs = [
        (start + a, start + b)
        for start in range(0, len(plan), IMAGES_A_PROMPT)
        for a, b in itertools.combinations(range(IMAGES_A_PROMPT), 2)
    ]
    gaps = np.array([scores[a] - scores[b] for a, b in pairs])
    tie = np.abs(gaps) <= np.quantile(np.abs(gaps), TIE_SHARE)
    temperature = flip_temperature(gaps[~tie])
    rows, flips = [], 0
    for index, (a, b) in enumerate(pairs):
        chance = 1 / (1 + math.exp(-max(-700.0, min(700.0, gaps[index] / temperature))))
        wins = keyed_fraction("label", seed, plan[a]["key"], plan[b]["key"]) < chance
        label = 0.5 if tie[index] else float(wins)
        flips += int(not tie[index] and wins != (gaps[index] > 0))
        ids = [hashlib.sha256(files[i]).hexdigest()[:32] for i in (a, b)]
        rows.append(
            {
                "are_different": bool(files[a] != files[b]),
                "caption": plan[a]["caption"],
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
                "model_0": _model_name(plan[a]),
                "model_1": _model_name(plan[b]),
                "ranking_id": index,
                "user_id": 0,
                "num_example_per_prompt": len(pairs) * IMAGES_A_PROMPT // len(plan),
                "__index_level_0__": index,
            }
        )
    return rows, {"temperature": temperature, "flips": flips, "ties": int(tie.sum())}


def make_offline(
    out: Path,
    seed: int,
    *,
    num_prompts: int = 340,
    sources: Mapping[str, Path] | None = None,
    shares: Mapping[str, float] | None = None,
    judge: Path | None = None,
) -> int:
    """Write preference pairs of train prompts in the columns of Pick-a-Pic v2.

    Each prompt gets `IMAGES_A_PROMPT` images, whose source, number of steps and guidance scale are drawn by
    keyed hash; every two of them are a pair. Image 0 wins with probability sigmoid((score_0 - score_1) /
    temperature) under the training judge; the temperature is set so that `FLIP_SHARE` of the decided labels
    are expected to contradict the judge, and the `TIE_SHARE` closest pairs are ties (0.5).

    Args:
        out: the parquet file.
        seed: names the choice of prompts and the noise of the labels.
        num_prompts: number of prompts, three pairs each.
        sources: folder of each named source; by default the two shipped bases.
        shares: how often each source draws, summing to 1; by default equal.
        judge: folder of the labelling judge; by default the shipped training judge.

    Returns:
        The number of pairs. The file's schema metadata holds temperature, flip and tie counts and sources as
        JSON.
    """
    sources = sources or {"emoji-diffusion": asset_path("diffusion"), "emoji-flow": asset_path("flow")}
    shares = shares or {name: 1 / len(sources) for name in sources}
    prompts = sorted(train_prompts(), key=lambda prompt: keyed_fraction("offline prompt", seed, prompt.id))
    plan = _plan(prompts[:num_prompts], sources, shares)
    files = [_jpeg(image) for image in _draw(plan, sources)]
    stored = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
    scores = _judge_scores(judge or asset_path("judge_train"), stored, [item["caption"] for item in plan])
    rows, labelling = _label(plan, files, scores, seed)
    facts = {
        "judge": "judge_train",
        **labelling,
        "pairs": len(rows),
        "seed": seed,
        "sources": dict(shares),
        "jpeg_quality": JPEG_QUALITY,
    }
    table = arrow.Table.from_pylist(rows, schema=_COLUMNS)
    table = table.replace_schema_metadata({"diffexpo": json.dumps(facts)})
    out.parent.mkdir(parents=True, exist_ok=True)
    # Dictionary pages hold each image once a column, though two of three pairs share it.
    parquet.write_table(table, out, compression="zstd", dictionary_pagesize_limit=1 << 25)
    print(f"offline: {facts}", flush=True)
    return len(rows)


def _model_name(item: dict[str, Any]) -> str:
    return f"{item['source']}/steps={item['steps']}/guidance={item['guidance']:g}"
