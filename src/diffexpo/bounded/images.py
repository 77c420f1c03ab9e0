"""Images of strangers: whether their files are whole and of a size that fits in memory, and their pixels as
the file says that they are to be shown. Without torch."""

from __future__ import annotations

import io
import re
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from diffexpo.bounded.texts import UnreadableError, read_regular
from diffexpo.errors import DataError, ImportFormatError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 64 * 1024 * 1024
MAX_BUFFERED_PIXELS = 16 * 1024 * 1024
MAX_PROFILE_BYTES = 2**22
MAX_SCANS = 100
MAX_SEGMENTS = 100_000
_LARGE = 2 * 1024 * 1024
_JPEG = b"\xff\xd8"
_PNG = b"\x89PNG\r\n\x1a\n"
# A segment of a JPEG: a mark, which may be filled with 0xFF in front, and the length of what follows.
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])(..)?", re.DOTALL)
# Within compressed pixels 0xFF is followed by zero or a restart mark; any other mark ends them.
_NEXT_MARK = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_SCAN, _END = 0xDA, 0xD9
_AFTER_SCAN = frozenset((_SCAN, _END, 0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE))
# Frames that can be decoded, and whether they are decoded a few lines at a time.
_FRAMES = {0xC0: True, 0xC1: True, 0xC2: False, 0xC9: True, 0xCA: False}
_NO_IMAGE, _DAMAGED = "not an image", "truncated or damaged"


def verify_image(data: bytes) -> None:
    """Refuse bytes that are no whole image. Every byte is decoded, a JPEG at an eighth of its size.

    Raises:
        ImportFormatError: with a reason: "not an image"; "truncated or damaged"; "more than 64 megapixels";
            "more than 16 megapixels in a format that is decoded whole" (all but baseline JPEG); "a JPEG of
            more than 100 scans".
    """
    with opened(data) as image, nullcontext() if _is_baseline(image) else _one_if_large(image):
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


def read_image(path: Path) -> np.ndarray:
    """A file's image (H,W,3) uint8 as `whole_image` has it; DataError for a file that is none."""
    try:
        return pixels_of(read_regular(path, MAX_IMAGE_BYTES))
    except (OSError, UnreadableError, ImportFormatError) as error:
        raise DataError(f"{path} is no image that can be read ({error}); copy it again") from None


def pixels_of(data: bytes, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """The pixels (H,W,3) uint8 of `whole_image`."""
    with whole_image(data, formats) as image:
        return np.array(image, dtype=np.uint8)


@contextmanager
def whole_image(data: bytes, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """The image in RGB, within the limits of `verify_image`; while a thread uses a large one, no other
    decodes one. What goes wrong in the block is no damage and passes as it is."""
    with ExitStack() as turn:
        yield _decoded(data, formats, turn)


def _decoded(data: bytes, formats: Sequence[str], turn: ExitStack) -> Image.Image:
    # a function of its own, so that only the result is kept in memory while it is used
    with opened(data, formats) as image:
        turn.enter_context(_one_if_large(image))
        return on_white(image)


class _Quiet:
    """No warnings while any thread is inside; `warnings.catch_warnings` alone is not for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._caught = warnings.catch_warnings(action="ignore")
                self._caught.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._caught.__exit__(None, None, None)


_QUIET = _Quiet()
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def opened(data: bytes, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """The image with its header read and found to fit in memory; what goes wrong in the block is damage."""
    with _QUIET:
        try:
            image = Image.open(io.BytesIO(data), formats=list(formats))
        except Image.DecompressionBombError as error:
            raise ImportFormatError("more than 64 megapixels") from error
        except MemoryError:  # of the machine, not of the image
            raise
        except Exception as error:  # decoders raise whatever their parsers stumble over
            raise ImportFormatError(_NO_IMAGE) from error
        with image:
            _check_size(image.width, image.height, is_baseline=_is_baseline(image))
            if image.format == "JPEG":
                _check_scans(data.count(b"\xff\xda"))
            try:
                yield image
            except (ImportFormatError, MemoryError):
                raise
            except Exception as error:  # as above
                raise ImportFormatError(_DAMAGED) from error


def _is_baseline(image: Image.Image) -> bool:
    """Whether it is decoded a few lines at a time."""
    return image.format == "JPEG" and not image.info.get("progressive")


def _one_if_large(image: Image.Image) -> AbstractContextManager[object]:
    """No two threads decode large images whole at once, which would take much memory."""
    return _ONE_AT_A_TIME if image.width * image.height > _LARGE else nullcontext()


def _check_size(width: int, height: int, *, is_baseline: bool) -> None:
    if width * height > MAX_PIXELS:
        raise ImportFormatError("more than 64 megapixels")
    if width * height > MAX_BUFFERED_PIXELS and not is_baseline:
        raise ImportFormatError("more than 16 megapixels in a format that is decoded whole")


def _check_scans(count: int) -> None:
    # each scan is a pass over the whole image, so a few kilobytes of them can take hours
    if count > MAX_SCANS:
        raise ImportFormatError(f"a JPEG of more than {MAX_SCANS} scans")


def verify_structure(data: bytes) -> None:
    """Refuse files that are cut or too large, without decoding JPEG and PNG; WebP is decoded.

    A JPEG must have consecutive segments, a frame that can be decoded, no marks within its compressed pixels
    and an end mark; a PNG the checksum of every chunk, IHDR first and IEND last. What follows the end is
    ignored, as decoders do. The reasons are those of `verify_image`.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)
    else:
        verify_image(data)


def _check_jpeg(data: bytes) -> None:
    place, num_scans, has_frame = 2, 0, False
    for _ in range(MAX_SEGMENTS):
        segment = _SEGMENT.match(data, place)
        kind = segment[1][0] if segment else 0
        if num_scans and kind == _END:
            return
        if segment is None or segment[2] is None or (num_scans and kind not in _AFTER_SCAN):
            break
        body = segment.end()
        place = body - 2 + int.from_bytes(segment[2], "big")
        if kind in _FRAMES:
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (body + 1, body + 3))
            _check_size(width, height, is_baseline=_FRAMES[kind])
            has_frame = height > 0 and width > 0
        if kind == _SCAN:
            num_scans += 1
            _check_scans(num_scans)
            pixels_end = _NEXT_MARK.search(data, place)
            if not has_frame or pixels_end is None:
                break
            place = pixels_end.start()
    raise ImportFormatError(_DAMAGED if num_scans else _NO_IMAGE)


def _check_png(data: bytes) -> None:
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise ImportFormatError(_NO_IMAGE)
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if height == 0 or width == 0:
        raise ImportFormatError(_NO_IMAGE)
    _check_size(width, height, is_baseline=False)
    place, has_pixels, view = len(_PNG), False, memoryview(data)
    for _ in range(MAX_SEGMENTS):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        checksum = int.from_bytes(view[end - 4 : end], "big")
        if end > len(data) or zlib.crc32(view[place + 4 : end - 4]) != checksum:
            break
        has_pixels = has_pixels or kind == b"IDAT" and end > place + 12
        if kind == b"IEND" and has_pixels:
            return
        place = end
    raise ImportFormatError(_DAMAGED)


def on_white(image: Image.Image) -> Image.Image:
    """The image in sRGB as it is to be shown: turned as its EXIF orientation says, the colours those of its
    profile, 16-bit grey scaled to 8 bits, transparency laid on white."""
    image = _in_srgb(ImageOps.exif_transpose(image))
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image with colours in sRGB, where its file carries the profile of another space; one whose profile
    cannot be read is taken as it is, as viewers do."""
    profile = image.info.get("icc_profile", b"")
    if image.mode not in ("RGB", "RGBA") or not 0 < len(profile) <= MAX_PROFILE_BYTES:
        return image
    try:
        found = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(found).lower():
            return image
        own = ImageCms.createProfile("sRGB")
        shown = ImageCms.profileToProfile(image, found, own, outputMode=image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return image if shown is None else shown
