"""Whether a picture's file is whole and of a size that fits in memory, read from its structure: no pixel is
decoded.

A file that was cut, that lacks a piece of its header or in which bytes were overwritten such that they read
as a mark, is found. A changed byte within the compressed pixels of a JPEG is mostly not, and mostly decoding
does not find it either: the picture then shows it. What only decoding finds, the run that encodes the picture
finds, and quarantines the row.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

from diffexpo.data.images import MAX_PIXELS
from diffexpo.errors import ImportFormatError

MAX_BUFFERED_PIXELS = 16 * 1024 * 1024
MAX_SCANS = 100
MAX_SEGMENTS = 100_000
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
# JPEG markers: the frames that libjpeg decodes (baseline, extended, progressive, the latter two also with
# arithmetic coding), marks without a body, and what stands where.
_FRAMES, _PROGRESSIVE = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA)), frozenset((0xC2, 0xCA))
_HUFFMAN, _SCAN, _END = 0xC4, 0xDA, 0xD9
_ALONE = frozenset((0x01, *range(0xD0, 0xD8), _END))
_TABLES = frozenset((_HUFFMAN, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
_BEHIND_SCAN = _TABLES | {_SCAN, _END, 0xDC}
_NOT_IN_HEADER = frozenset(range(256)) - _TABLES - _ALONE - {_SCAN} | {_END}
_SAMPLINGS = frozenset(16 * across + down for across in range(1, 5) for down in range(1, 5))
_TABLE_NUMBERS = frozenset(range(4))
_SCAN_MARK = b"\xff\xda"
_SHORT_HEADER = 2048
# A mark begins with one 0xFF or more. Within compressed pixels 0xFF is followed by zero or by a restart mark;
# any other mark ends them.
_LEAD = re.compile(rb"\xff+")
_NEXT_MARK = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_NO_IMAGE = "not an image"
_DAMAGED = "truncated or damaged"


def check_structure(data: bytes) -> None:
    """Refuse the bytes of a JPEG or PNG file that is not whole or too large.

    JPEG: segments follow each other up to the first scan, one of them a frame that can be decoded; compressed
    pixels hold no marks but restarts, and the last scan is followed by an end mark. PNG: every chunk has its
    checksum, the first is IHDR, the last IEND. What stands behind the end is ignored, as decoders do.

    Raises:
        ImportFormatError: "not an image" for bytes of neither format or without a whole header; "truncated or
            damaged"; the reasons of `check_size`; "a JPEG of more than 100 scans".
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)
    else:
        raise ImportFormatError(_NO_IMAGE)


def check_size(width: int, height: int, *, is_baseline: bool) -> None:
    """Refuse pictures that would take too much memory to decode.

    Args:
        width, height: In pixels.
        is_baseline: A JPEG of one scan, which is decoded a few lines at a time.

    Raises:
        ImportFormatError: "more than 64 megapixels"; "more than 16 megapixels in a format that is decoded
            whole" (all but baseline JPEG).
    """
    if width * height > MAX_PIXELS:
        raise ImportFormatError("more than 64 megapixels")
    if width * height > MAX_BUFFERED_PIXELS and not is_baseline:
        raise ImportFormatError("more than 16 megapixels in a format that is decoded whole")


# ---- JPEG --------------------------------------------------------------------------------------------------


def _check_jpeg(data: bytes) -> None:
    place = _first_pixels(data)
    for _ in range(MAX_SCANS):
        kind, place = _behind_scan(data, place)
        if kind == _END:
            return
    raise ImportFormatError(f"a JPEG of more than {MAX_SCANS} scans")


def _first_pixels(data: bytes) -> int:
    """Where the compressed pixels of the first scan begin."""
    mark = data.find(_SCAN_MARK, 2, _SHORT_HEADER)
    if mark > 0:
        try:
            return _read_short_header(data[: mark + 2 + int.from_bytes(data[mark + 2 : mark + 4], "big")])
        except ImportFormatError:
            pass  # a wrong header, or the mark belongs to a thumbnail inside it
    return _read_header(data)


def _read_header(data: bytes) -> int:
    place, has_frame = 2, False
    for _ in range(MAX_SEGMENTS):
        kind, start, place = _segment(data, place, _NO_IMAGE)
        if kind in _FRAMES and not has_frame:
            _check_frame(data[start:place], is_baseline=kind not in _PROGRESSIVE)
            has_frame = True
        elif kind in _CHECKS:
            _CHECKS[kind](data[start:place])
        elif kind in _NOT_IN_HEADER:
            raise ImportFormatError(_NO_IMAGE)
        if kind == _SCAN and has_frame:
            return place
        if kind == _SCAN:
            break
    raise ImportFormatError(_DAMAGED)


_read_short_header = lru_cache(256)(_read_header)
"""Pictures of one size that come from one program mostly have the same header, byte for byte."""


def _behind_scan(data: bytes, place: int) -> tuple[int, int]:
    """(_SCAN, where its compressed pixels begin) or (_END, ...): what follows the scan whose compressed
    pixels begin at `place`."""
    mark = _NEXT_MARK.search(data, place)
    if mark is None:
        raise ImportFormatError(_DAMAGED)
    place = mark.start()
    for _ in range(MAX_SEGMENTS):
        kind, start, place = _segment(data, place, _DAMAGED)
        if kind not in _BEHIND_SCAN:
            break
        if kind in _CHECKS:
            _CHECKS[kind](data[start:place])
        if kind in (_SCAN, _END):
            return kind, place
    raise ImportFormatError(_DAMAGED)


def _segment(data: bytes, place: int, reason: str) -> tuple[int, int, int]:
    """(marker, start of its body, end) of the segment at `place`."""
    lead = _LEAD.match(data, place)
    if lead is None or lead.end() == len(data):
        raise ImportFormatError(reason)
    place = lead.end() + 1
    kind = data[place - 1]
    if kind in _ALONE:
        return kind, place, place
    end = place + int.from_bytes(data[place : place + 2], "big")
    if end < place + 2 or end > len(data):
        raise ImportFormatError(reason)
    return kind, place + 2, end


def _check_frame(body: bytes, *, is_baseline: bool) -> None:
    """A frame header: bits a sample, height, width, then 3 bytes for each component."""
    components = body[5] if len(body) > 5 else 0
    if components not in (1, 3, 4) or len(body) != 6 + 3 * components or body[0] != 8:
        raise ImportFormatError(_NO_IMAGE)
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if (
        height == 0
        or width == 0
        or not _SAMPLINGS.issuperset(body[7::3])
        or not _TABLE_NUMBERS.issuperset(body[8::3])
    ):
        raise ImportFormatError(_DAMAGED)
    check_size(width, height, is_baseline=is_baseline)


def _check_scan(body: bytes) -> None:
    """A scan header: two bytes for each of 1 to 4 components, the second with the numbers of its tables, and
    three bytes."""
    components = body[0] if body else 0
    if (
        not 1 <= components <= 4
        or len(body) != 4 + 2 * components
        or any(byte & 0xCC for byte in body[2:-3:2])
    ):
        raise ImportFormatError(_DAMAGED)


def _check_huffman(body: bytes) -> None:
    """Tables, each of a number (DC or AC, 0 to 3), how many codes there are of 1 to 16 bits, and a value for
    each code: of DC ones, bits."""
    place = 0
    while place < len(body):
        counts = body[place + 1 : place + 17]
        # codes of n bits are at most 2^n, of which those that begin with shorter codes are taken: Kraft's
        # inequality
        taken = sum(count << (16 - bits) for bits, count in enumerate(counts, start=1))
        is_dc, values = body[place] < 16, body[place + 17 : place + 17 + sum(counts)]
        if (
            body[place] & 0xEC
            or len(counts) < 16
            or taken > 1 << 16
            or (is_dc and max(values, default=0) > 15)
        ):
            raise ImportFormatError(_DAMAGED)
        place += 17 + sum(counts)
    if place != len(body):
        raise ImportFormatError(_DAMAGED)


_CHECKS = {_HUFFMAN: _check_huffman, _SCAN: _check_scan}


# ---- PNG ---------------------------------------------------------------------------------------------------


def _check_png(data: bytes) -> None:
    place, has_pixels = len(_PNG), False
    _check_png_header(data[place : place + 25])
    for _ in range(MAX_SEGMENTS):
        if place + 12 > len(data):
            break
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        # a view: the chunk may be the whole file
        if end > len(data) or zlib.crc32(memoryview(data)[place + 4 : end - 4]) != int.from_bytes(
            data[end - 4 : end], "big"
        ):
            break
        kind = data[place + 4 : place + 8]
        has_pixels = has_pixels or (kind == b"IDAT" and end > place + 12)
        if kind == b"IEND" and has_pixels:
            return
        place = end
    raise ImportFormatError(_DAMAGED)


def _check_png_header(chunk: bytes) -> None:
    """The first chunk: length 13, IHDR, width, height, bits a sample, kind of colour, three bytes,
    checksum."""
    is_header = len(chunk) == 25 and chunk[:8] == b"\0\0\0\x0dIHDR"
    if not is_header or chunk[16] not in _PNG_DEPTHS.get(chunk[17], ()):
        raise ImportFormatError(_NO_IMAGE)
    width, height = int.from_bytes(chunk[8:12], "big"), int.from_bytes(chunk[12:16], "big")
    if height == 0 or width == 0:
        raise ImportFormatError(_NO_IMAGE)
    check_size(width, height, is_baseline=False)
