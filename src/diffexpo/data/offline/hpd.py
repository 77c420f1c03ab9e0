"""The Human Preference Datasets: HPDv2 (rankings in JSON next to an image folder) and HPDv3 (pairs in JSON).

HPDv2: `train.json` is a list of {prompt, human_preference, file_path}, 1 = preferred; `test.json` of {prompt,
image_path, rank}, the smallest rank is the best. Images are in `train/` and `test/` next to them. HPDv3: a
list of {prompt, path1, path2, confidence, ...}; path1 is preferred. Archives have to be unpacked first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffexpo.data.offline.cells import number_of
from diffexpo.data.offline.reading import Record, column_names
from diffexpo.data.offline.sources import index_file, read_image
from diffexpo.data.offline.votes import Layout, Vote, has_columns, row_format, votes_of_ranking
from diffexpo.errors import ImportFormatError


def _hpdv2(file: Path) -> Layout:
    column_names(file)  # a file that is no list, or cut, is refused before anything is read

    def votes(name: str, row: Record) -> Iterator[Vote]:
        ranks, preference = row.get("rank"), row.get("human_preference")
        if preference is not None:
            chosen = list(map(number_of, preference)) if isinstance(preference, list) else [None]
            if any(number not in (0, 1) for number in chosen):
                raise ImportFormatError("human_preference is not a list of 0 and 1")
            ranks = [1 - number for number in chosen if number is not None]
        paths = row.get("file_path", row.get("image_path"))
        return votes_of_ranking(
            name, row.get("prompt"), ranks, paths, lambda path: read_image(file.parent, path, file.stem)
        )

    return (), votes


def _hpdv3(file: Path) -> Layout:
    column_names(file)

    def votes(name: str, row: Record) -> Iterator[Vote]:
        yield Vote(
            name,
            "0",
            row.get("prompt"),
            lambda side: read_image(file.parent, row.get(f"path{side + 1}"), "images"),
            models=(row.get("model1"), row.get("model2")),
            uids=(row.get("path1"), row.get("path2")),
            confidence=row.get("confidence"),
        )

    return (), votes


HPDV2 = row_format(
    "HPDv2: train.json or test.json next to the unpacked image folders",
    has_columns(index_file, (".json",), ("prompt", "human_preference"), ("prompt", "image_path", "rank")),
    lambda path: [index_file(path)],
    _hpdv2,
)
HPDV3 = row_format(
    "HPDv3: train.json next to the unpacked images",
    has_columns(index_file, (".json",), ("prompt", "path1", "path2")),
    lambda path: [index_file(path)],
    _hpdv3,
)
