"""Files and folders that are either whole or absent, whatever moment the process dies at.

    write under a temporary name -> fsync -> rename -> fsync of the folder

A rename is atomic, and the two fsyncs keep its order on the disk; what a killed process leaves is
named `.tmp`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from diffexpo.errors import StoreError

TEMPORARY = ".tmp"
SUMS = "SHA256SUMS"
_CHUNK = 1 << 24
_ADVICE = {
    errno.ENOSPC: "free space and resume",
    errno.EDQUOT: "free space within the quota and resume",
    errno.EFBIG: "raise the limit on the length of files (ulimit -f), or free space and resume",
    errno.EROFS: "the file system is read-only: mount it for writing, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name or folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EEXIST: "something else has this name: choose another folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and resume",
    errno.ENFILE: "close other programs and resume",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EIO), "check the disk and its permissions, then resume"
    ),
    errno.ESTALE: "mount the network file system again and resume",
}
"""What to do about a refusal of the file system."""


def explain_refusal(error: OSError) -> str | None:
    """One sentence on a refusal of the file system and what to do; None for an error that is about something
    else, such as a file that is not there."""
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return None
    what = error.filename or "a file"
    return f"could not use {what}: {error.strerror}. Nothing stored before is lost: {advice}."


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for the block to write a file or to make a folder at; it becomes `path` at the end of
    the block and is removed at an exception. Where the file system refuses (full, read-only, ...), a
    StoreError is raised and `path` is untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_dir():
            shutil.rmtree(temporary)
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            _sync(part)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        _remove(temporary)
        advice = _ADVICE.get(error.errno or 0, "check the disk and its permissions, then resume")
        raise StoreError(
            f"could not write {path}: {error.strerror or error}. Nothing stored before is lost: {advice}."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that `path` holds all of it or does not change. Raises as `replacing`."""
    with replacing(path) as temporary:
        put(temporary, data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """`write_bytes` of a value as indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def put(path: Path, data: bytes) -> None:
    """Write a file inside the block of `replacing`, which makes it durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left[:_CHUNK]) :]
    finally:
        os.close(descriptor)


def readable(folder: Path) -> None:
    """Give every file in a folder the mode of a new file: some libraries write theirs for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, files: Sequence[Path]) -> None:
    """Say in SHA256SUMS of a folder (`sha256sum -c`) what these of its files hold."""
    lines = (f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(files))
    write_text(folder / SUMS, "".join(lines))


def changed_files(folder: Path) -> dict[str, str]:
    """What has become of files that SHA256SUMS of a folder names: name -> "has changed" or "is missing"."""
    found = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, between, name = line.partition("  ")
        path = folder / name
        if len(digest) != 64 or not between:
            found[SUMS] = "has changed"
        elif not path.is_file():
            found[name] = "is missing"
        elif sha256_of(path) != digest:
            found[name] = "has changed"
    return found


def sync_tree(folder: Path) -> None:
    """Make durable what lies in a folder that others than `replacing` have written."""
    for part in (*folder.rglob("*"), folder, folder.parent):
        _sync(part)


def checksum_of(body: Mapping[str, object]) -> str:
    """Hex SHA-256 of JSON values, whatever the order of keys and the white space of the file they are in."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def seen(files: Sequence[Path]) -> str:
    """What the file system tells of files without reading them: length, place and times, of which no program
    can set the last (ctime) at will. The same text means the same content, short of a defect of the disk."""
    facts = [(path.name, path.stat()) for path in files]
    told = [f"{name} {s.st_size} {s.st_ino} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in facts]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def sha256_once(path: Path) -> str:
    """`sha256_of`, read once in a process as long as the file system tells of no change."""
    return _sha256_seen(path.resolve(), seen([path]))


@lru_cache(maxsize=4096)
def _sha256_seen(path: Path, seen: str) -> str:
    return sha256_of(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove what is there, unless the disk refuses that too: it goes as garbage at the next start."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
