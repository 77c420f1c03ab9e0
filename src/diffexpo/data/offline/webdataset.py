"""Pairs in tar files, as the webdataset library writes them: members that share a key are one sample.

    KEY.winner.jpg  KEY.loser.jpg  KEY.txt                       the prompt as text
    KEY.0.jpg       KEY.1.jpg      KEY.json                      {"prompt": ..., "preferred": 0}, see `tables`

Members are read one at a time and never unpacked to the disk; the members of a key are neighbours. Tars are
not compressed (images are already).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from diffexpo.bounded.images import MAX_IMAGE_BYTES
from diffexpo.bounded.texts import is_junk
from diffexpo.data.offline.reading import Damage, Record, object_of, text_in
from diffexpo.data.offline.sources import IMAGE_SUFFIXES, find_files, has_suffix, printable
from diffexpo.data.offline.votes import Layout, Vote, row_format, verdict_of_record
from diffexpo.errors import ImportFormatError

SIDES = ("winner", "loser", "0", "1")
_TEXT_BYTES = 2**18
_NAME = 400


def _layout(file: Path) -> Layout:
    try:
        with tarfile.open(file, "r:") as tar:
            tar.next()
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise ImportFormatError(
            f"{file} is not an uncompressed tar file, or is damaged ({error}); get it again or unpack it"
        ) from error
    return (), _votes


def _samples(file: Path, columns: Sequence[str], start: int) -> Iterator[tuple[str, Record | Damage]]:
    """(key, what its members hold) of each sample: images by side, "txt", "json", and the first "problem"."""
    seen: set[bytes] = set()
    key, sample = "", Record()
    for member, data in _members(file):
        if isinstance(data, Damage):
            yield member[:_NAME], data
            continue
        name = PurePosixPath(member)
        stem, _, suffix = name.name.partition(".")
        found = printable((name.parent / stem).as_posix())
        if sample and found != key:
            yield key[:_NAME], sample
        if not sample or found != key:
            digest = hashlib.blake2b(found.encode(), digest_size=8).digest()
            problem = f"key longer than {_NAME} characters" if len(found) > _NAME else ""
            key, sample = found, {"problem": problem or ("key is there twice" if digest in seen else "")}
            seen.add(digest)
        try:
            _add(sample, suffix.lower(), data)
        except ImportFormatError as error:
            sample["problem"] = sample["problem"] or str(error)
    if sample:
        yield key[:_NAME], sample


def _members(file: Path) -> Iterator[tuple[str, bytes | Damage]]:
    """(name, bytes) of every member, or why it is not read."""
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
                vars(tar)["members"].clear()  # it keeps every member otherwise
                is_part = not any(map(is_junk, PurePosixPath(member.name).parts))
                if not member.isdir() and (is_part or ".." in PurePosixPath(member.name).parts):
                    yield member.name, _contents(tar, member, size)
            except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError):
                yield f"byte {max(last, 0)}", Damage("damaged tar: the rest is not read")
                return
        # a tar ends with blocks of zeros; one that was cut between two members would look whole otherwise
        with open(file, "rb") as stream:
            stream.seek(tar.offset)
            tail = stream.read(2**24)
        if not tail:
            yield f"byte {tar.offset}", Damage("the tar has no end mark: members may be missing")
        elif tail.strip(b"\0"):
            yield f"byte {tar.offset}", Damage("there is data behind the tar's end mark, which is not read")


def _contents(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int) -> bytes | Damage:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        return Damage("member name leaves the archive")
    if not member.isreg() or member.issparse():
        return Damage("member is not a regular file")
    if member.offset_data + member.size > size:
        return Damage("truncated member")
    if member.name.lower().endswith(IMAGE_SUFFIXES):
        if member.size > MAX_IMAGE_BYTES:
            return Damage("member larger than 64 MiB")
    elif member.size > _TEXT_BYTES:
        return Damage("text larger than 256 KiB")
    stream = tar.extractfile(member)
    data = stream.read() if stream is not None else b""
    return data if len(data) == member.size else Damage("truncated member")


def _add(sample: Record, suffix: str, data: bytes) -> None:
    """Put one member into its sample, passing over what is not part of a pair."""
    side, _, kind = suffix.rpartition(".")
    if side in SIDES and f".{kind}" in IMAGE_SUFFIXES:
        if side in sample:
            raise ImportFormatError(f"two pictures {side}")
        sample[side] = data
    elif suffix == "txt":
        sample["txt"] = text_in(data)
    elif suffix == "json":
        sample["json"] = object_of(data)


def _votes(name: str, row: Record) -> Iterator[Vote]:
    sides = SIDES[:2] if "winner" in row else SIDES[2:]
    missing = [f"no picture {side}" for side in sides if side not in row]
    if row["problem"] or missing:
        raise ImportFormatError(row["problem"] or missing[0])
    record = row.get("json", {})
    yield Vote(
        name,
        "0" if sides[0] == "winner" else verdict_of_record(record),
        row.get("txt", record.get("prompt", record.get("caption"))),
        lambda side: row[sides[side]],
        models=(record.get("model_0"), record.get("model_1")),
        confidence=record.get("confidence"),
    )


WEBDATASET = row_format(
    "uncompressed tar files of winner, loser and prompt members",
    lambda path: has_suffix(path, (".tar",)),
    lambda path: find_files(path, (".tar",), "uncompressed .tar files of pairs"),
    _layout,
    rows=_samples,
)
