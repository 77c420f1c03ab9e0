"""The emoji images with their captions, attributes, splits and prompts (no torch at import).

One parquet file holds every image (Noto and Twemoji, 64 px on white) with the CLDR label and keywords, the
attributes that the code points state, and two splits: whole concepts, and combinations of attributes, that no
base model ever saw. Every choice is a keyed hash of names, so that the same file and the same prompts come
out everywhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import parquet

from diffexpo import worlds
from diffexpo.types import Prompt
from diffexpo.worlds.keyed import keyed_fraction

# Training concepts for runs that draw the same few prompts repeatedly, like the animals of the DDPO paper.
ANIMALS = (
    "bat", "bear", "bird", "butterfly", "cat", "cow", "deer", "dog", "fish", "fox", "goat", "horse", "koala",
    "lizard", "llama", "monkey", "owl", "rabbit", "shark", "spider", "tiger", "turtle", "wolf", "zebra",
)  # fmt: skip
# Of the train (concept, style) prompts: kept for evaluation, never a prompt of an online run.
RESERVED_SHARE = 0.12

ASSETS = {
    "diffusion": "diffusion",
    "flow": "flow",
    "judge_train": "judge_train",
    "judge_heldout": "judge_heldout",
    "step_judge": "step_judge",
    "probe": "probe",
    "offline": "offline.parquet",
    "negatives": "negatives.txt",
    "images": "images.parquet",
}
LISTS = ("train", "animals", "heldout")


def asset_path(name: str) -> Path:
    """Return the folder or the file of a shipped asset, one of `ASSETS`.

    Raises:
        KeyError: for any other name; the message lists the names.
    """
    return worlds.asset_path("emoji", name)


@lru_cache(maxsize=2)
def _table(path: str) -> list[dict[str, Any]]:
    columns = [name for name in parquet.read_schema(path).names if name != "image"]
    return parquet.read_table(path, columns=columns).to_pylist()


def load_rows(path: Path | None = None) -> list[dict[str, Any]]:
    """Return one dictionary per image, without its bytes, in the file's order.

    Rows have id, hexcode, style, concept, caption, keywords, group, subgroup, gender, skin_tone, occupation,
    split_concept and split_attributes; 7,572 in the shipped file (`path` names another), 3,786 of each style.
    """
    return [dict(row) for row in _table(str(path or asset_path("images")))]


@lru_cache(maxsize=2)
def _image_bytes(path: str) -> dict[str, bytes]:
    table = parquet.read_table(path, columns=["id", "image"])
    return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))


def load_images(ids: Iterable[str], path: Path | None = None) -> np.ndarray:
    """Return images (B, 3, 64, 64) in [0, 1], float32 RGB on white, of ids of `load_rows` (`noto-1f525`,
    say).

    Raises:
        KeyError: for an id that the file lacks.
    """
    stored = _image_bytes(str(path or asset_path("images")))
    images = []
    for row_id in ids:
        if row_id not in stored:
            raise KeyError(f"emoji image {row_id!r} is not in the images file - ids look like 'noto-1f525'")
        with Image.open(io.BytesIO(stored[row_id])) as image:
            images.append(np.asarray(image.convert("RGB"), dtype=np.uint8))
    if not images:
        return np.zeros((0, 3, 64, 64), dtype=np.float32)
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)


def base_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the plainest row of one concept and style: without gender or tone where there is such a row."""
    genders = {"": 0, "person": 1, "man": 2, "woman": 3}
    tones = {"": 0, "default": 1}
    return min(rows, key=lambda row: (genders[row["gender"]], tones.get(row["skin_tone"], 2), row["id"]))


def _prompt_of(row: dict[str, Any], text: str, id_: str) -> Prompt:
    attributes = {name: row[name] for name in ("style", "gender", "skin_tone", "occupation") if row[name]}
    attributes["concept"] = row["concept"]
    return Prompt(id=id_, text=text, category=row["group"], attributes=attributes)


def _is_reserved(concept: str, style: str) -> bool:
    return keyed_fraction("reserved caption", concept, style) < RESERVED_SHARE


@lru_cache(maxsize=1)
def _all_prompts() -> dict[str, tuple[Prompt, ...]]:
    found: dict[str, list[Prompt]] = {"train": [], "concept": [], "attributes": [], "caption": []}
    by_concept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in load_rows():
        by_concept.setdefault((row["concept"], row["style"]), []).append(row)
    for (concept, style), rows in by_concept.items():
        plain = base_row(rows)
        text = f"{style} {plain['caption']}"
        if plain["split_concept"] == "heldout":
            found["concept"].append(_prompt_of(plain, text, f"concept-{plain['id']}"))
            continue
        if _is_reserved(concept, style):
            found["caption"].append(_prompt_of(plain, text, f"caption-{plain['id']}"))
            if len(plain["keywords"]) >= 3:
                words = f"{style} " + ", ".join(plain["keywords"][:3])
                found["caption"].append(_prompt_of(plain, words, f"keywords-{plain['id']}"))
            continue
        found["train"].append(_prompt_of(plain, text, f"train-{plain['id']}"))
        for row in rows:
            stated = row["skin_tone"] not in ("", "default") or row["gender"] in ("man", "woman")
            if row["id"] == plain["id"] or not stated:
                continue
            kind = "train" if row["split_attributes"] == "train" else "attributes"
            if kind == "train" and not row["occupation"]:
                continue  # tones of hands and couples would drown the other prompts
            found[kind].append(_prompt_of(row, f"{style} {row['caption']}", f"{kind}-{row['id']}"))
    return {kind: tuple(prompts) for kind, prompts in found.items()}


def train_prompts() -> list[Prompt]:
    """Return the prompts that an online run may train on, in a fixed order.

    There is one for each (train concept, style) that is not reserved for evaluation, such as "noto fire", and
    one for each occupation with stated attributes. `attributes` holds style and concept, and gender,
    skin_tone and occupation where the row has them.
    """
    return list(_all_prompts()["train"])


def animal_prompts() -> list[Prompt]:
    """Return 24 of `train_prompts`: well-known animals, from "noto bat" to "noto zebra"."""
    by_concept = {
        prompt.attributes["concept"]: prompt
        for prompt in train_prompts()
        if prompt.attributes["style"] == "noto" and prompt.attributes["concept"] in ANIMALS
    }
    return [by_concept[concept] for concept in ANIMALS]


def heldout_prompts(kind: str = "all") -> list[Prompt]:
    """Return the prompts for evaluation, in a fixed order.

    Args:
        kind: "concept" (concepts that no base model saw), "attributes" (combinations that none saw),
            "caption" (labels and keyword paraphrases of seen concepts, which no online run trains on), "all"
            (the three in turn), or "animals" (those of all that are animals and plants). None of their texts
            is among `train_prompts()`.

    Raises:
        KeyError: for any other kind.
    """
    kinds = ("concept", "attributes", "caption")
    if kind not in ("all", "animals", *kinds):
        raise KeyError(
            f"held-out prompts of kind {kind!r} are unknown - expected all, animals, {', '.join(kinds)}"
        )
    if kind == "animals":
        return [prompt for prompt in heldout_prompts() if prompt.category == "animals-nature"]
    found = _all_prompts()
    return [prompt for each in (kinds if kind == "all" else (kind,)) for prompt in found[each]]


def prompts(name: str) -> list[Prompt] | None:
    """Return the list of prompts of a name: train, animals, or heldout with a kind such as heldout-concept;
    None for other names."""
    if name == "train":
        return train_prompts()
    if name == "animals":
        return animal_prompts()
    if name.startswith("heldout"):
        return heldout_prompts(name.removeprefix("heldout").lstrip("-") or "all")
    return None
