"""Pairs as plain image files, in one of two layouts.

    SET/NAME/winner.png   SET/NAME/loser.png   SET/NAME/prompt.txt           one folder per pair
    SET/winners/NAME.png  SET/losers/NAME.png  SET/prompts.csv or .jsonl     columns `name` and `prompt`

Images end in .jpg, .jpeg, .png or .webp.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from diffexpo.bounded.images import MAX_IMAGE_BYTES
from diffexpo.bounded.texts import is_junk
from diffexpo.data.offline.cells import text_of_id
from diffexpo.data.offline.reading import Damage, column_names, read_rows
from diffexpo.data.offline.sources import IMAGE_SUFFIXES, printable, read_picture
from diffexpo.data.offline.votes import Format, Vote, skip_votes
from diffexpo.errors import ImportFormatError, MissingError

ROLES = ("winner", "loser")
_PROMPT_BYTES = 2**18
LOOKED_AT = 8
"""Folders, in order of their names, of which one must look like a pair; hidden ones are none."""


def _is_like(path: Path) -> bool:
    if not path.is_dir():
        return False
    if all((path / f"{role}s").is_dir() for role in ROLES):
        return True
    looked_at = _pair_folders(path)[:LOOKED_AT]
    return any(file.stem.lower() in (*ROLES, "prompt") for folder in looked_at for file in _inside(folder))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise MissingError(f"offline.source: there is no folder {path}; expected a folder of pairs")
    if not (path / "winners").is_dir():
        files = (
            file for folder in _pair_folders(path) for file in folder.iterdir() if not is_junk(file.name)
        )
        return sorted(file for file in files if file.is_file() and not file.is_symlink())
    if not (path / "losers").is_dir():
        raise ImportFormatError(f"{path} has winners/ but no losers/; expected both, with the same names")
    images = [
        file
        for role in ROLES
        for file in (path / f"{role}s").iterdir()
        if file.is_file() and not is_junk(file.name)
    ]
    return [_prompts_file(path), *sorted(images)]


def _votes(path: Path, start: int) -> Iterator[Vote]:
    votes = _listed(path) if (path / "winners").is_dir() else (_of_folder(f) for f in _pair_folders(path))
    return skip_votes(votes, start)


def _vote(name: str, prompt: object, winners: list[Path], losers: list[Path]) -> Vote:
    """The vote of the images that were found for each role: there must be one for each."""
    for role, found in zip(ROLES, (winners, losers), strict=True):
        if len(found) != 1:
            return Vote(name, f"two {role} pictures" if found else f"no {role} picture")
    return Vote(name, "0", prompt, lambda side: _read((winners, losers)[side][0], MAX_IMAGE_BYTES))


def _read(file: Path, most: int) -> bytes:
    if file.is_symlink():
        raise ImportFormatError("picture is a link; copy the file here")
    return read_picture(file, most)


def _by_stem(files: Iterable[Path], *, lower: bool = False) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(file.stem.lower() if lower else file.stem, []).append(file)
    return found


def _inside(folder: Path) -> Iterator[Path]:
    return (file for file in folder.iterdir() if not is_junk(file.name))


def _pair_folders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not is_junk(entry.name)
        )


def _of_folder(folder: Path) -> Vote:
    name = printable(folder.name)
    found = _by_stem(_inside(folder), lower=True)
    vote = _vote(name, "", *(found.get(role, []) for role in ROLES))
    if vote.verdict != "0":
        return vote
    try:
        return replace(vote, caption=_read(folder / "prompt.txt", _PROMPT_BYTES).decode("utf-8-sig"))
    except ImportFormatError:
        return Vote(name, "no prompt.txt")
    except UnicodeDecodeError:
        return Vote(name, "text is not UTF-8")


def _prompts_file(path: Path) -> Path:
    found = [path / name for name in ("prompts.csv", "prompts.jsonl") if (path / name).is_file()]
    if len(found) != 1:
        what = "both prompts.csv and prompts.jsonl" if found else "neither prompts.csv nor prompts.jsonl"
        raise MissingError(f"offline.source: {path} holds {what}; expected one, with `name` and `prompt`")
    missing = {"name", "prompt"} - set(column_names(found[0])) if found[0].suffix == ".csv" else ()
    if missing:
        raise ImportFormatError(f"{found[0]}: column {min(missing)!r} is missing; expected name and prompt")
    return found[0]


def _listed(path: Path) -> Iterator[Vote]:
    file = _prompts_file(path)
    images = {role: _by_stem(_inside(path / f"{role}s")) for role in ROLES}
    used: set[str] = set()
    for number, row in read_rows(file, ()):
        row_name = f"{file.name}:{number}"
        if isinstance(row, Damage):
            yield Vote(row_name, row.reason, count=row.count)
            continue
        name = text_of_id(row.get("name"))
        if name is None:
            yield Vote(row_name, "no name")
        elif name in used:
            yield Vote(row_name, "name is there twice")
        else:
            used.add(name)
            yield _vote(row_name, row.get("prompt"), *(images[role].get(name, []) for role in ROLES))
    for role in ROLES:
        for name in sorted(set(images[role]) - used):
            yield Vote(printable(f"{role}s/{name}"), "no prompt")


FOLDERS = Format(
    summary="one folder per pair (winner.*, loser.*, prompt.txt), or winners/, losers/ and a prompts file",
    is_like=_is_like,
    files=_files,
    votes=_votes,
)
