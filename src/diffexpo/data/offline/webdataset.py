"""Pairs in tar files, as the webdataset library writes them: members that share a key are one sample.

    KEY.winner.jpg  KEY.loser.jpg  KEY.txt                       the prompt as text
    KEY.0.jpg       KEY.1.jpg      KEY.json                      {"prompt": ..., "preferred": 0}, see `tables`

Members are read one at a time and never unpacked to the disk; the members of a key are neighbours. Tars are
not compressed (pictures are already).
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from diffexpo.data.offline.base import (
    MAX_PICTURE_BYTES,
    Format,
    Vote,
    find_files,
    has_suffix,
    printable,
    row_name,
    skip_votes,
    verdict_of_record,
)
from diffexpo.errors import ImportFormatError

PICTURES = ("jpg", "jpeg", "png", "webp")
SIDES = {"winner": 0, "loser": 1, "0": 0, "1": 1}
_TEXT_BYTES = 2**18
_NAME = 400


@dataclass
class _Sample:
    """The members of one key, as they come."""

    key: str
    pictures: dict[str, bytes] = field(default_factory=dict)
    prompt: str | None = None
    record: dict[str, object] | None = None
    problem: str = ""


def _files(path: Path) -> list[Path]:
    files = find_files(path, (".tar",), "uncompressed .tar files of pairs")
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                tar.next()
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise ImportFormatError(
                f"{file} is not an uncompressed tar file, or is damaged ({error}); get it again or unpack it"
            ) from error
    return files


def _votes(path: Path, start: int) -> Iterator[Vote]:
    return skip_votes((vote for file in _files(path) for vote in _file_votes(path, file)), start)


def _file_votes(root: Path, file: Path) -> Iterator[Vote]:
    seen: set[bytes] = set()
    sample: _Sample | None = None
    for member, data in _members(file):
        if isinstance(data, str):
            yield Vote(row_name(root, file, member[:_NAME]), data)
            continue
        name = PurePosixPath(member)
        stem, _, suffix = name.name.partition(".")
        key = printable((name.parent / stem).as_posix())
        if sample is not None and sample.key != key:
            yield _vote(root, file, sample)
            sample = None
        if sample is None:
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            sample = _Sample(key, problem="key is there twice" if digest in seen else "")
            seen.add(digest)
        _add(sample, suffix.lower(), data)
    if sample is not None:
        yield _vote(root, file, sample)


def _members(file: Path) -> Iterator[tuple[str, bytes | str]]:
    """(name, bytes) of every member, or (name, why it is not read)."""
    with tarfile.open(file, "r:") as tar:
        size, last = file.stat().st_size, -1
        while True:
            try:
                member = tar.next()
                if member is None:
                    break
                # a size that points backwards would be read for ever
                if member.offset <= last or member.size < 0:
                    raise tarfile.ReadError("a member points backwards")
                last = member.offset
                tar.members.clear()  # it keeps every member otherwise
                if not member.isdir():
                    problem = _problem(member, size)
                    yield member.name, problem or _contents(tar, member)
            except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError):
                yield f"byte {max(last, 0)}", "damaged tar: the rest is not read"
                return
        problem = _end_problem(file, tar.offset)
        if problem:
            yield f"byte {tar.offset}", problem


def _end_problem(file: Path, offset: int) -> str:
    """A tar ends with blocks of zeros; one that was cut between two members would look whole otherwise."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        tail = stream.read(2**24)
    if not tail:
        return "the tar has no end mark: members may be missing"
    return "there is data behind the tar's end mark, which is not read" if tail.strip(b"\0") else ""


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | str:
    stream = tar.extractfile(member)
    data = stream.read() if stream is not None else b""
    return data if len(data) == member.size else "truncated member"


def _problem(member: tarfile.TarInfo, size: int) -> str:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        return "member name leaves the archive"
    if not member.isreg() or member.issparse():
        return "member is not a regular file"
    if member.offset_data + member.size > size:
        return "truncated member"
    is_picture = member.name.lower().endswith(tuple(f".{suffix}" for suffix in PICTURES))
    if member.size > (MAX_PICTURE_BYTES if is_picture else _TEXT_BYTES):
        return "member larger than 64 MiB" if is_picture else "text larger than 256 KiB"
    return ""


def _add(sample: _Sample, suffix: str, data: bytes) -> None:
    """Put one member into its sample; what is not part of a pair is passed over."""
    try:
        side, _, kind = suffix.rpartition(".")
        if kind in PICTURES and side in SIDES:
            if side in sample.pictures:
                sample.problem = sample.problem or f"two pictures {side}"
            sample.pictures[side] = data
        elif suffix == "txt":
            sample.prompt = data.decode("utf-8-sig")
        elif suffix == "json":
            record = json.loads(data.decode("utf-8-sig"))
            sample.record = record if isinstance(record, dict) else None
            sample.problem = sample.problem or ("" if isinstance(record, dict) else "not a JSON object")
    except UnicodeDecodeError:
        sample.problem = sample.problem or "text is not UTF-8"
    except (ValueError, RecursionError):
        sample.problem = sample.problem or "not JSON"


def _vote(root: Path, file: Path, sample: _Sample) -> Vote:
    name = row_name(root, file, sample.key[:_NAME])
    record = sample.record or {}
    sides = ("winner", "loser") if "winner" in sample.pictures else ("0", "1")
    missing = [side for side in sides if side not in sample.pictures]
    if len(sample.key) > _NAME:
        return Vote(name, f"key longer than {_NAME} characters")
    if sample.problem or missing:
        return Vote(name, sample.problem or f"no picture {missing[0]}")
    pictures = [sample.pictures[side] for side in sides]
    return Vote(
        name,
        "0" if sides[0] == "winner" else verdict_of_record(record),
        sample.prompt if sample.prompt is not None else record.get("prompt", record.get("caption")),
        lambda side: pictures[side],
        models=(record.get("model_0"), record.get("model_1")),
        confidence=record.get("confidence"),
    )


WEBDATASET = Format(
    summary="uncompressed tar files of winner, loser and prompt members",
    is_like=lambda path: has_suffix(path, (".tar",)),
    files=_files,
    votes=_votes,
)
