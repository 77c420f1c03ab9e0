"""The Human Preference Datasets: HPDv2 (rankings in JSON beside an image folder) and HPDv3 (pairs in JSON).

HPDv2: `train.json` is a list of {prompt, human_preference, file_path}, 1 = preferred; `test.json` of {prompt,
image_path, rank}, the smallest rank is the best. Pictures lie in `train/` and `test/` beside them. HPDv3: a
list of {prompt, path1, path2, confidence, ...}; path1 is preferred. Archives have to be unpacked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from diffexpo.data.offline.base import (
    Format,
    PictureFolder,
    Vote,
    find_files,
    row_name,
    skip_votes,
    votes_of_ranking,
)
from diffexpo.data.offline.reading import Damage, json_list
from diffexpo.errors import ImportFormatError, MissingError


def index_file(path: Path, name: str = "train.json", suffix: str = ".json") -> Path:
    """The file that lists the pairs: the source itself, or `name` in it, or its only file with the suffix.

    Raises:
        MissingError: there is none, or there are several and none has the name.
    """
    if not path.is_dir():
        return find_files(path, (suffix,), f"a {suffix} file that lists pairs")[0]
    if (path / name).is_file():
        return path / name
    found = sorted(file for file in path.glob(f"*{suffix}") if file.is_file())
    if len(found) != 1:
        what = f"holds {', '.join(file.name for file in found[:5])}" if found else f"holds no {suffix} file"
        raise MissingError(f"offline.source: {path} {what}, not {name}; name the file that lists the pairs")
    return found[0]


def first_record(path: Path, suffix: str = ".json") -> Mapping[str, object]:
    """The first object of a JSON list; empty when there is none."""
    try:
        file = index_file(path, suffix=suffix)
        if file.suffix.lower() != suffix or not file.is_file():
            return {}
        first = next(json_list(file), (0, None))[1]
    except (ImportFormatError, MissingError, OSError):
        return {}
    return first if isinstance(first, dict) else {}


def has_keys(*alternatives: tuple[str, ...]) -> Callable[[Path], bool]:
    """A test whether the first object of a JSON list has all keys of one of the alternatives."""

    def is_like(path: Path) -> bool:
        record = first_record(path)
        return any(all(key in record for key in keys) for keys in alternatives)

    return is_like


def _files(path: Path) -> list[Path]:
    file = index_file(path)
    next(json_list(file), None)  # a file that is no list, or cut, is refused before anything is read
    return [file]


def _hpdv2_votes(path: Path, start: int) -> Iterator[Vote]:
    file = index_file(path)
    folder = PictureFolder(file.parent)
    rankings = (
        _ranking(row_name(file, file, position), entry, folder, file.stem)
        for position, entry in json_list(file)
    )
    return skip_votes((vote for votes in rankings for vote in votes), start)


def _ranking(name: str, entry: object, folder: PictureFolder, split: str) -> Iterator[Vote]:
    if isinstance(entry, Damage):
        return iter([Vote(name, entry.reason)])
    if not isinstance(entry, dict):
        return iter([Vote(name, "not a JSON object")])
    paths = entry.get("file_path", entry.get("image_path"))
    ranks = entry.get("rank")
    preference = entry.get("human_preference")
    if preference is not None:
        if not isinstance(preference, list) or any(value not in (0, 1) for value in preference):
            return iter([Vote(name, "human_preference is not a list of 0 and 1")])
        ranks = [1 - int(value) for value in preference]
    load = None
    if isinstance(paths, list):
        load = [lambda path=path: folder.read(path, split) for path in paths]
    return votes_of_ranking(name, entry.get("prompt"), ranks, load, _uids(paths))


def _uids(paths: object) -> list[object] | None:
    return [path if isinstance(path, str) else None for path in paths] if isinstance(paths, list) else None


def _hpdv3_votes(path: Path, start: int) -> Iterator[Vote]:
    file = index_file(path)
    folder = PictureFolder(file.parent)
    for position, entry in json_list(file):
        if position < start:
            continue
        name = row_name(file, file, position)
        if isinstance(entry, Damage):
            yield Vote(name, entry.reason)
        elif not isinstance(entry, dict):
            yield Vote(name, "not a JSON object")
        else:
            yield Vote(
                name,
                "0",
                entry.get("prompt"),
                lambda side, entry=entry: folder.read(entry.get(f"path{side + 1}"), "images"),
                models=(entry.get("model1"), entry.get("model2")),
                uids=(entry.get("path1"), entry.get("path2")),
                confidence=entry.get("confidence"),
            )


HPDV2 = Format(
    summary="HPDv2: train.json or test.json beside the unpacked image folders",
    is_like=has_keys(("prompt", "human_preference"), ("prompt", "image_path", "rank")),
    files=_files,
    votes=_hpdv2_votes,
)
HPDV3 = Format(
    summary="HPDv3: train.json beside the unpacked images",
    is_like=has_keys(("prompt", "path1", "path2")),
    files=_files,
    votes=_hpdv3_votes,
)
