"""The files and images that a preference set consists of: found, read within limits, named, told apart.

Nothing outside the set is ever opened, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from diffexpo.bounded.images import MAX_IMAGE_BYTES
from diffexpo.bounded.texts import UnreadableError, is_junk, read_regular
from diffexpo.errors import ImportFormatError, MissingError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FOOTER = 2**16
_HASHED_WHOLE = 2**26


def read_image(folder: Path, name: object, *prefixes: str) -> bytes:
    """Bytes of `folder/name`, or of `folder/prefix/name` for the first prefix under which it is found; what
    cannot be read or is outside the folder is an ImportFormatError with a reason that can be counted."""
    if not isinstance(name, str) or not name.strip():
        raise ImportFormatError("no picture is named")
    if "://" in name or name.startswith("data:"):
        raise ImportFormatError("picture is a URL; pictures are never fetched")
    inside = PurePosixPath(name.replace("\\", "/"))
    if inside.is_absolute() or ".." in inside.parts or ":" in inside.parts[0] or "\0" in name:
        raise ImportFormatError("picture path leaves the folder")
    for prefix in ("", *prefixes):
        try:
            real = (folder / prefix / inside).resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, RuntimeError, ValueError) as error:
            raise ImportFormatError("picture cannot be opened") from error
        if not real.is_relative_to(folder.resolve()):
            raise ImportFormatError("picture path leaves the folder")
        return read_picture(real)
    raise ImportFormatError("picture is missing")


def image_bytes(value: object, folder: Path) -> object:
    """What an image's cell means: the file's bytes, or those of the file that its text names below the
    folder; structs of the datasets library hold either."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return read_image(folder, value) if isinstance(value, str) else value


def read_picture(path: Path, most: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes; otherwise an ImportFormatError with a reason that
    can be counted."""
    try:
        return read_regular(path, most)
    except UnreadableError as error:
        raise ImportFormatError(f"picture is {error}") from error
    except (OSError, ValueError) as error:
        raise ImportFormatError("picture cannot be opened") from error


def find_files(path: Path, suffixes: Sequence[str], expected: str) -> list[Path]:
    """The regular files a source means, at least one: itself, or those below it with one of the suffixes,
    sorted by path."""
    if not os.path.lexists(path):
        raise MissingError(f"offline.source: {path} does not exist; expected {expected}")
    found = sorted(_below(path, suffixes)) if path.is_dir() else [path]
    if not found:
        raise MissingError(f"offline.source: {path} holds no {suffixes[0]} file; expected {expected}")
    for file in found:
        if not file.is_file():
            raise ImportFormatError(
                f"{file} is not a regular file (a pipe, a device or a dead link); remove it or name another "
                "source"
            )
    return found


def index_file(path: Path, suffix: str = ".json") -> Path:
    """The file that lists the pairs: the source itself, its train.json, or its only file with the suffix."""
    if not path.is_dir():
        return find_files(path, (suffix,), f"a {suffix} file that lists pairs")[0]
    if (path / "train.json").is_file():
        return path / "train.json"
    found = sorted(file for file in path.glob(f"*{suffix}") if file.is_file() and not is_junk(file.name))
    if len(found) != 1:
        what = ", ".join(file.name for file in found[:5]) or f"no {suffix} file"
        raise MissingError(
            f"offline.source: {path} holds {what}, not train.json; name the file that lists the pairs"
        )
    return found[0]


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file has one of the suffixes, or a folder holds such a file anywhere below it."""
    return any(_below(path, suffixes)) if path.is_dir() else path.suffix.lower() in suffixes


def _below(path: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not is_junk(name)]
        files = (Path(folder, name) for name in names if not is_junk(name))
        yield from (file for file in files if file.suffix.lower() in suffixes)


def row_name(root: Path, file: Path, number: object) -> str:
    """ "file:number", the file relative to the source, so that equal names in two folders stay apart."""
    return printable(f"{file.name if file == root else file.relative_to(root).as_posix()}:{number}")


def printable(text: str) -> str:
    """The text with what cannot be written in UTF-8 as escapes."""
    return text.encode(errors="backslashreplace").decode()


def fingerprint(files: Iterable[Path], root: Path) -> dict[str, str]:
    """What tells one set of files from another, by name: length and SHA-256, of large ones only of their end
    (where Parquet keeps its index), of images the length alone; beyond 32 files one digest of all that."""
    found = {row_name(root, file, "").rstrip(":"): _file_mark(file) for file in files}
    if len(found) <= 32:
        return found
    text = "\n".join(f"{name} {value}" for name, value in found.items())
    return {f"{len(found)} files": hashlib.sha256(text.encode()).hexdigest()[:32]}


def _file_mark(file: Path) -> str:
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return str(file.stat().st_size)
    with open(file, "rb") as stream:
        length = stream.seek(0, 2)
        is_footed = length > _HASHED_WHOLE or file.suffix.lower() in (".parquet", ".tar")
        stream.seek(max(0, length - _FOOTER) if is_footed else 0)
        return f"{length}:{hashlib.file_digest(stream, 'sha256').hexdigest()[:32]}"
