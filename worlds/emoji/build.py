"""Builds the images file from the unpacked npm packages that hold the images and the labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
from PIL import Image
from pyarrow import parquet

from diffexpo.errors import DataError
from diffexpo.worlds.emoji import keyed_fraction
from worlds.emoji.attributes import OCCUPATIONS, SKIN_TONES

HELDOUT_CONCEPTS = 0.06
HELDOUT_TRIPLES = 0.08
HELDOUT_TONES = 0.06
NUM_COLOURS = 48

_IMAGES = {
    "noto": "emoji-datasource-google-16.0.0/package/img/google/64",
    "twemoji": "emoji-datasource-twitter-16.0.0/package/img/twitter/64",
}
_LABELS = "emojibase-data-17.0.0/package/en"
_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
_NEUTRAL = {"1F468": "1F9D1", "1F469": "1F9D1"}


def _plain(hexcode: str) -> str:
    return hexcode.upper().replace("-FE0F", "")


def read_attributes(hexcode: str, has_tones: bool) -> tuple[str, str]:
    """Read gender presentation and skin tone from code points.

    Args:
        hexcode: code points joined by "-", such as "1F469-1F3FF-200D-1F692".
        has_tones: whether the emoji exists with skin tones (then no modifier means "default").

    Returns:
        (gender, skin_tone): "person", "man", "woman" or "" (no single person), and one of `SKIN_TONES` or ""
        (none, or several different ones). `read_attributes("1F469-1F3FF-200D-1F692", True) == ("woman",
        "dark")`.
    """
    points = _plain(hexcode).split("-")
    tones = {_TONES[point] for point in points if point in _TONES}
    tone = tones.pop() if len(tones) == 1 else ("" if tones or not has_tones else "default")
    people = [point for point in points if point in ("1F468", "1F469", "1F9D1")]
    if len(people) > 1 or not has_tones:
        return "", tone
    if "1F469" in people or "2640" in points:
        return "woman", tone
    if "1F468" in people or "2642" in points:
        return "man", tone
    return ("person" if people else ""), tone


def _neutral_of(hexcode: str) -> str:
    """Return the code points of the same role without gender, which may or may not exist as an emoji."""
    points = [_NEUTRAL.get(point, point) for point in _plain(hexcode).split("-")]
    while len(points) > 2 and points[-1] in ("2640", "2642"):
        points = points[:-2]
    return "-".join(points)


def _read_labels(folder: Path) -> dict[str, dict[str, Any]]:
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    labels = {_plain(entry["hexcode"]): entry["label"].lower() for entry in entries}
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        own = _plain(entry["hexcode"])
        neutral = _neutral_of(own)
        concept = (
            labels.get(neutral, labels[own]) if own.count("1F46") + own.count("1F9D1") < 2 else labels[own]
        )
        skins = entry.get("skins", [])
        for member in [entry, *skins]:
            gender, tone = read_attributes(member["hexcode"], bool(skins))
            if concept in OCCUPATIONS and not gender:
                gender = "person"
            found[_plain(member["hexcode"])] = {
                "concept": concept,
                "caption": member["label"].lower(),
                "keywords": [word.lower() for word in entry.get("tags", [])],
                "group": groups.get(entry.get("group", -1), "letters"),
                "subgroup": subgroups.get(entry.get("subgroup", -1), ""),
                "gender": gender,
                "skin_tone": tone,
                "occupation": concept if concept in OCCUPATIONS else "",
            }
    return found


def _heldout_concepts(labels: dict[str, dict[str, Any]]) -> set[str]:
    """Choose the share HELDOUT_CONCEPTS of each group's concepts: those with the smallest keyed hash."""
    groups: dict[str, set[str]] = {}
    for row in labels.values():
        if not row["occupation"]:
            groups.setdefault(row["group"], set()).add(row["concept"])
    chosen: set[str] = set()
    for group, concepts in groups.items():
        ordered = sorted(concepts, key=lambda concept: keyed_fraction("heldout concept", group, concept))
        chosen.update(ordered[: round(HELDOUT_CONCEPTS * len(ordered))])
    return chosen


def _has_heldout_attributes(row: dict[str, Any]) -> bool:
    """Hold out (occupation, gender, tone) triples, and tones of hands; the plain row of a concept stays."""
    if row["skin_tone"] in ("", "default"):
        return False
    if row["occupation"]:
        triple = (row["occupation"], row["gender"], row["skin_tone"])
        return keyed_fraction("heldout triple", *triple) < HELDOUT_TRIPLES
    if row["subgroup"].startswith("hand"):
        return keyed_fraction("heldout tone", row["concept"], row["skin_tone"]) < HELDOUT_TONES
    return False


def _encode(path: Path) -> bytes:
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    # 48 colours an image: 41-44 dB from the original, half the bytes (most of the saving is alpha-edge
    # noise).
    few = flat.quantize(NUM_COLOURS, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.convert("RGB").save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def build_dataset(sources: Path, out: Path) -> int:
    """Write the images file.

    Args:
        sources: folder with the unpacked packages emoji-datasource-google 16.0.0, emoji-datasource-twitter
            16.0.0 and emojibase-data 17.0.0, each in a folder of that name (with the version).
        out: the parquet file to write.

    Returns:
        The number of rows: 7,572.

    Raises:
        DataError: when a package is missing.
    """
    for needed in (*_IMAGES.values(), _LABELS):
        if not (sources / needed).is_dir():
            raise DataError(f"emoji sources: {sources / needed} is missing - unpack the npm package there")
    labels = _read_labels(sources / _LABELS)
    heldout = _heldout_concepts(labels)
    rows = []
    for style, folder in _IMAGES.items():
        for path in sorted((sources / folder).glob("*.png")):
            hexcode = _plain(path.stem)
            label = labels[hexcode]
            rows.append(
                {
                    "id": f"{style}-{hexcode.lower()}",
                    "hexcode": hexcode,
                    "style": style,
                    **label,
                    "split_concept": "heldout" if label["concept"] in heldout else "train",
                    "split_attributes": "heldout" if _has_heldout_attributes(label) else "train",
                    "image": _encode(path),
                }
            )
    assert all(row["skin_tone"] in ("", *SKIN_TONES) for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    schema = arrow.schema(
        [
            (name, arrow.list_(arrow.string()) if name == "keywords" else arrow.string())
            for name in list(rows[0])[:-1]
        ]
        + [("image", arrow.binary())]
    )
    table = arrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(
        table,
        out,
        compression="zstd",
        compression_level=15,
        row_group_size=len(rows),
        use_dictionary=[name for name in table.column_names if name not in ("id", "image")],
    )
    return len(rows)
