"""Whether a picture's file is whole, read from its structure: no pixel is decoded, so this goes as fast as a disk reads.

A file that was cut, or that something else was appended to in the middle, is found. Damage within the compressed pixels of a JPEG or a
WebP file is not: it shows when the picture is decoded, at the latest when a run encodes it, which quarantines the row.
"""

from __future__ import annotations

import zlib

from diffexpo.errors import ImportFormatError

_PNG = b"\x89PNG\r\n\x1a\n"
# JPEG markers that stand alone: TEM and the restart markers.
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))
_SCAN, _END = 0xDA, 0xD9


def check_structure(data: bytes) -> None:
    """Refuse the bytes of a JPEG, PNG or WebP file that is not whole.

    JPEG: segments follow each other up to the first scan, behind which an end mark stands. PNG: every chunk has its checksum, the last is
    IEND. WebP: the file is as long as it says.

    Raises:
        ImportFormatError: "truncated or damaged"; "not an image" for bytes of none of these formats.
    """
    if data.startswith(b"\xff\xd8"):
        is_whole = _is_whole_jpeg(data)
    elif data.startswith(_PNG):
        is_whole = _is_whole_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        is_whole = int.from_bytes(data[4:8], "little") + 8 <= len(data)
    else:
        raise ImportFormatError("not an image")
    if not is_whole:
        raise ImportFormatError("truncated or damaged")


def _is_whole_jpeg(data: bytes) -> bool:
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == 0xFF or kind in _ALONE:
            place += 1 if kind == 0xFF else 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == _END or length < 2:
            return False
        place += 2 + length
        if kind == _SCAN:
            return data.rfind(b"\xff\xd9", place) >= 0
    return False


def _is_whole_png(data: bytes) -> bool:
    place = len(_PNG)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        end = place + 12 + length
        if end > len(data) or zlib.crc32(body) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if body[:4] == b"IEND":
            return True
        place = end
    return False
