"""Regular files and JSON of strangers: bounded in bytes and in depth, in UTF-8, without half characters.

What cannot be read is an UnreadableError, a ValueError whose text is the reason alone: the caller knows the
file's part and what to do about it. A file that is not there stays an OSError.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 256 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 1000
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableError(ValueError):
    """Why a text or a file is not read: a reason, without its name."""


def read_regular(path: Path, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes; never waits, as a named pipe would make one."""
    # opened before it is looked at, so that nobody can exchange it in between
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableError("not a regular file")
        data = file.read(most + 1)
    if len(data) > most:
        raise UnreadableError(f"larger than {size_in_words(most)}")
    return data


def size_in_words(count: int) -> str:
    """A bound in bytes as messages name it; `size_in_words(2**20)` is "1 MiB"."""
    for size, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} bytes"


def is_junk(name: str) -> bool:
    """Whether programs put a file or folder of this name beside what people keep: hidden ones, caches, the
    copies of archives made on a Mac."""
    return name.startswith((".", "__MACOSX", "__pycache__"))


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """A regular file's text, in UTF-8, without the mark that some editors put first."""
    return text_of(read_regular(path, most))


def text_of(data: bytes | bytearray, encoding: str = "utf-8-sig") -> str:
    """Bytes as text, by default without the mark that some editors put first."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 text (byte {error.start})") from None


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
    """The value of a JSON file."""
    return parse_json(read_regular(path, most))


def check_json_files(folder: Path) -> None:
    """Raise an UnreadableError, which names the file, unless all JSON files of a folder that another library
    is to read can be read within the bounds."""
    for file in sorted(folder.glob("*.json")):
        try:
            read_json(file)
        except UnreadableError as error:
            raise UnreadableError(f"{file.name}: {error}") from None


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text, nested at most 64 levels deep."""
    if not isinstance(text, str):
        text = text_of(text)
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise UnreadableError(f"nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise UnreadableError(str(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and not _is_shallow(value):
        raise UnreadableError(f"nested deeper than {MAX_DEPTH} levels")
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UnreadableError("a text holds half a surrogate pair, which is no character") from None
    return value


def _integer(digits: str) -> int:
    """An integer; Python itself refuses to read one of thousands of digits."""
    if len(digits) > MAX_DIGITS:
        raise UnreadableError(f"a number of more than {MAX_DIGITS} digits")
    return int(digits)


def _is_shallow(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False
