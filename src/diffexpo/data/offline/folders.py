"""Pairs as plain picture files, in one of two layouts.

    SET/NAME/winner.png   SET/NAME/loser.png   SET/NAME/prompt.txt           a folder a pair
    SET/winners/NAME.png  SET/losers/NAME.png  SET/prompts.csv or .jsonl     columns `name` and `prompt`

Pictures end in .jpg, .jpeg, .png or .webp.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from diffexpo.data.offline.base import (
    MAX_PICTURE_BYTES,
    PICTURE_SUFFIXES,
    Format,
    Vote,
    printable,
    read_regular,
    skip_votes,
)
from diffexpo.data.offline.reading import Damage, Record, csv_header, csv_rows, json_lines
from diffexpo.errors import ImportFormatError, MissingError

ROLES = ("winner", "loser")
_PROMPT_BYTES = 2**18


def _is_like(path: Path) -> bool:
    if not path.is_dir():
        return False
    if all((path / f"{role}s").is_dir() for role in ROLES):
        return True
    with os.scandir(path) as entries:
        first = next((entry.path for entry in entries if entry.is_dir()), None)
    return first is not None and any(
        Path(name).stem.lower() in (*ROLES, "prompt") for name in os.listdir(first)
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise MissingError(f"offline.source: there is no folder {path}; expected a folder of pairs")
    if not (path / "winners").is_dir():
        return sorted(
            file
            for folder in _pair_folders(path)
            for file in folder.iterdir()
            if file.is_file() and not file.is_symlink()
        )
    if not (path / "losers").is_dir():
        raise ImportFormatError(f"{path} has winners/ but no losers/; expected both, with the same names")
    pictures = [file for role in ROLES for file in (path / f"{role}s").iterdir() if file.is_file()]
    return [_prompts_file(path), *sorted(pictures)]


def _votes(path: Path, start: int) -> Iterator[Vote]:
    votes = _listed(path) if (path / "winners").is_dir() else (_of_folder(f) for f in _pair_folders(path))
    return skip_votes(votes, start)


# ---- a folder a pair ---------------------------------------------------------------------------------------


def _pair_folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _of_folder(folder: Path) -> Vote:
    name = printable(folder.name)
    pictures: dict[str, list[Path]] = {role: [] for role in ROLES}
    for file in folder.iterdir():
        if file.stem.lower() in pictures and file.suffix.lower() in PICTURE_SUFFIXES:
            pictures[file.stem.lower()].append(file)
    for role, found in pictures.items():
        if len(found) != 1:
            return Vote(name, f"no {role} picture" if not found else f"two {role} pictures")
    try:
        prompt = _read(folder / "prompt.txt", _PROMPT_BYTES).decode("utf-8-sig")
    except ImportFormatError:
        return Vote(name, "no prompt.txt")
    except UnicodeDecodeError:
        return Vote(name, "text is not UTF-8")
    return Vote(name, "0", prompt, lambda side: _read(pictures[ROLES[side]][0], MAX_PICTURE_BYTES))


def _read(file: Path, most: int) -> bytes:
    if file.is_symlink():
        raise ImportFormatError("picture is a link; copy the file here")
    return read_regular(file, most)


# ---- winners/ and losers/ ----------------------------------------------------------------------------------


def _prompts_file(path: Path) -> Path:
    found = [path / name for name in ("prompts.csv", "prompts.jsonl") if (path / name).is_file()]
    if len(found) != 1:
        what = "both prompts.csv and prompts.jsonl" if found else "neither prompts.csv nor prompts.jsonl"
        raise MissingError(f"offline.source: {path} holds {what}; expected one, with `name` and `prompt`")
    if found[0].suffix == ".csv":
        missing = {"name", "prompt"} - set(csv_header(found[0]))
        if missing:
            raise ImportFormatError(
                f"{found[0]}: column {min(missing)!r} is missing; expected name and prompt"
            )
    return found[0]


def _listed(path: Path) -> Iterator[Vote]:
    file = _prompts_file(path)
    pictures = {role: _by_stem(path / f"{role}s") for role in ROLES}
    used: set[str] = set()
    for number, row in csv_rows(file) if file.suffix == ".csv" else json_lines(file):
        yield _named(f"{file.name}:{number}", row, pictures, used)
    for role in ROLES:
        for name in sorted(set(pictures[role]) - used):
            yield Vote(printable(f"{role}s/{name}"), "no prompt")


def _named(
    row_name: str, row: Record | Damage, pictures: dict[str, dict[str, list[Path]]], used: set[str]
) -> Vote:
    if isinstance(row, Damage):
        return Vote(row_name, row.reason, count=row.count)
    name = row.get("name")
    if not isinstance(name, str) or not name:
        return Vote(row_name, "no name")
    if name in used:
        return Vote(row_name, "name is there twice")
    used.add(name)
    found = {role: pictures[role].get(name, []) for role in ROLES}
    for role, files in found.items():
        if len(files) != 1:
            return Vote(row_name, f"no {role} picture" if not files else f"two {role} pictures")
    return Vote(
        row_name, "0", row.get("prompt"), lambda side: _read(found[ROLES[side]][0], MAX_PICTURE_BYTES)
    )


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name in os.listdir(folder):
        if Path(name).suffix.lower() in PICTURE_SUFFIXES:
            found.setdefault(Path(name).stem, []).append(folder / name)
    return found


FOLDERS = Format(
    summary="a folder a pair (winner.*, loser.*, prompt.txt), or winners/, losers/ and a prompts file",
    is_like=_is_like,
    files=_files,
    votes=_votes,
)
