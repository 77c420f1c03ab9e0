"""Files of images are whole or not, without a pixel decoded."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from diffexpo.bounded.images import (
    MAX_SCANS,
    MAX_SEGMENTS,
    on_white,
    pixels_of,
    read_image,
    verify_image,
    verify_structure,
    whole_image,
)
from diffexpo.data.offline.writing import rewrite_pairs
from diffexpo.errors import DataError, ImportFormatError, StoreError
from tests.unit.data.conftest import jpeg

FILES = {
    "jpeg": {"format": "JPEG"},
    "progressive": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP"},
}


def picture(seed: int = 0, side: int = 32, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, **options)
    return out.getvalue()


def with_thumbnail(thumbnail: bytes, around: bytes) -> bytes:
    """A JPEG that carries another whole JPEG, end mark and all, in a segment of its own."""
    segment = b"Exif\0\0" + thumbnail
    return around[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + around[2:]


@pytest.mark.parametrize("name", FILES)
def test_whole_files_pass_and_no_beginning_of_one_does(name: str) -> None:
    data = picture(**FILES[name])
    verify_structure(data)
    verify_structure(data + b"\0\0")
    for end in range(0, len(data), 7):
        with pytest.raises(ImportFormatError):
            verify_structure(data[:end])


def test_a_thumbnails_end_is_not_the_images() -> None:
    around = picture(**FILES["jpeg"])
    data = with_thumbnail(picture(1, 8, **FILES["jpeg"]), around)
    verify_structure(data)
    with pytest.raises(ImportFormatError, match="truncated"):
        verify_structure(data[: len(data) - len(around) // 2])


def test_a_byte_changed_anywhere_in_a_png_is_found() -> None:
    data = picture(**FILES["png"])
    for place in range(len(data)):
        with pytest.raises(ImportFormatError):
            verify_structure(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def reason(check: Callable[[bytes], None], data: bytes) -> str:
    try:
        check(data)
    except ImportFormatError as error:
        return str(error)
    return ""


def any_jpeg(draw: random.Random) -> bytes:
    """A JPEG of any size and kind that Pillow writes."""
    mode = draw.choice(("RGB", "L", "CMYK"))
    coarse = Image.frombytes(mode, (4, 4), draw.randbytes(16 * {"RGB": 3, "L": 1, "CMYK": 4}[mode]))
    image = coarse.resize((draw.randrange(1, 60), draw.randrange(1, 60)))
    options: dict[str, object] = {
        "quality": draw.randrange(1, 96),
        "progressive": draw.random() < 0.5,
        "optimize": draw.random() < 0.5,
        "restart_marker_blocks": draw.choice((0, 1, 5)),
        "comment": draw.randbytes(draw.choice((0, 90))),
        "icc_profile": draw.randbytes(draw.choice((1, 70_000))),
    }
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def test_what_an_encoder_writes_is_whole() -> None:
    draw = random.Random(0)
    for _ in range(150):
        verify_structure(any_jpeg(draw))
    for mode in ("RGB", "L", "RGBA", "P", "1", "I;16", "LA"):
        for options in ({}, {"optimize": True}):
            out = io.BytesIO()
            Image.new(mode, (19, 7)).save(out, "PNG", **options)
            verify_structure(out.getvalue())


def found_by(check: Callable[[bytes], None], damaged: list[bytes]) -> int:
    return sum(bool(reason(check, data)) for data in damaged)


@pytest.mark.parametrize("options", [FILES["jpeg"], FILES["progressive"]])
def test_of_damage_to_pixels_it_finds_nearly_what_decoding_finds(options: dict[str, object]) -> None:
    draw = random.Random(1)
    damaged = []
    for number in range(300):
        data = bytearray(picture(number, 64, **options))
        place = draw.randrange(data.index(b"\xff\xda") + 14, len(data) - 70)
        data[place : place + 64] = draw.randbytes(64)
        damaged.append(bytes(data))
    found = found_by(verify_image, damaged)
    assert found > 30
    assert found_by(verify_structure, damaged) > 0.6 * found


def segment(kind: int, body: bytes) -> bytes:
    return bytes((0xFF, kind)) + (len(body) + 2).to_bytes(2, "big") + body


def frame(kind: int = 0xC0, height: int = 8, width: int = 8) -> bytes:
    return segment(kind, b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\1\1\x11\0")


SCAN = segment(0xDA, bytes((1, 1, 0, 0, 63, 0)))
PIXELS = b"\x12\xff\x00\xff\xd3\x34"


def hand_made(*parts: bytes, end: bytes = b"\xff\xd9") -> bytes:
    return b"\xff\xd8" + b"".join(parts) + end


def test_a_hand_made_jpeg_is_whole() -> None:
    verify_structure(hand_made(frame(), SCAN, PIXELS))
    verify_structure(hand_made(frame(0xC2), *[SCAN + PIXELS] * MAX_SCANS))
    verify_structure(hand_made(b"\xff\xff", frame(), b"\xff", SCAN, PIXELS, b"\xff\xff\xff"))
    verify_structure(hand_made(frame(height=8192, width=8192), SCAN, PIXELS))


DAMAGED, NO_IMAGE = "truncated or damaged", "not an image"
COMMENTS = segment(0xFE, b"") * (MAX_SEGMENTS + 1)
WRONG_JPEGS = {
    "no frame": (hand_made(SCAN, PIXELS), DAMAGED),
    "lossless": (hand_made(frame(0xC3), SCAN, PIXELS), DAMAGED),
    "no height": (hand_made(frame(height=0), SCAN, PIXELS), DAMAGED),
    "no segment": (hand_made(frame(), b"\x12\x34", SCAN, PIXELS), NO_IMAGE),
    "no pixels": (hand_made(frame()), NO_IMAGE),
    "a mark in the pixels": (hand_made(frame(), SCAN, PIXELS, b"\xff\x5c", PIXELS), DAMAGED),
    "a frame behind the pixels": (hand_made(frame(), SCAN, PIXELS, frame(), PIXELS), DAMAGED),
    "comments without end behind": (hand_made(frame(), SCAN, PIXELS, COMMENTS), DAMAGED),
    "no end": (hand_made(frame(), SCAN, PIXELS, end=b""), DAMAGED),
    "filling for an end": (hand_made(frame(), SCAN, PIXELS, end=b"\xff" * 9), DAMAGED),
    "comments without end before": (hand_made(COMMENTS, frame(), SCAN, PIXELS), NO_IMAGE),
    "101 scans": (
        hand_made(frame(0xC2), *[SCAN + PIXELS] * (MAX_SCANS + 1)),
        "a JPEG of more than 100 scans",
    ),
    "64 megapixels and a line": (
        hand_made(frame(height=8193, width=8192), SCAN, PIXELS),
        "more than 64 megapixels",
    ),
    "16 progressive megapixels and a line": (
        hand_made(frame(0xC2, height=4097, width=4096), SCAN, PIXELS),
        "more than 16 megapixels in a format that is decoded whole",
    ),
}


@pytest.mark.parametrize("name", WRONG_JPEGS)
def test_each_thing_that_is_wrong_has_its_reason(name: str) -> None:
    data, expected = WRONG_JPEGS[name]
    assert reason(verify_structure, data) == expected


@pytest.mark.parametrize("place", ["header", "pixels"])
@pytest.mark.parametrize("name", ["filling", "stuffing", "restarts", "comments"])
def test_a_long_hostile_file_takes_no_time(name: str, place: str) -> None:
    unit = {"filling": b"\xff", "stuffing": b"\xff\0", "restarts": b"\xff\xd0", "comments": b"\xff\xfe\0\2"}[
        name
    ]
    long = unit * (2**25 // len(unit))
    parts = (long, frame(), SCAN, PIXELS) if place == "header" else (frame(), SCAN, PIXELS, long)
    began = time.process_time()
    reason(verify_structure, hand_made(*parts))
    assert time.process_time() - began < 2


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def header(width: int = 8, height: int = 8) -> bytes:
    return chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0)))


PIXELS_AND_END = chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
PNGS = {
    "whole": (header() + PIXELS_AND_END, ""),
    "no pixels": (header() + chunk(b"IEND", b""), DAMAGED),
    "empty pixels": (header() + chunk(b"IDAT", b"") + chunk(b"IEND", b""), DAMAGED),
    "no end": (header() + chunk(b"IDAT", b"x"), DAMAGED),
    "no header": (chunk(b"IDAT", b"x" * 30) + chunk(b"IEND", b""), NO_IMAGE),
    "texts without end": (header() + chunk(b"tEXt", b"") * MAX_SEGMENTS + PIXELS_AND_END, DAMAGED),
    "no width": (header(width=0) + PIXELS_AND_END, NO_IMAGE),
    "2^31 columns": (header(width=2**31) + PIXELS_AND_END, "more than 64 megapixels"),
}


@pytest.mark.parametrize("name", PNGS)
def test_a_png_has_a_header_pixels_and_an_end(name: str) -> None:
    chunks, expected = PNGS[name]
    assert reason(verify_structure, b"\x89PNG\r\n\x1a\n" + chunks) == expected


def test_an_import_by_structure_writes_what_one_by_decoding_writes(tmp_path: Path) -> None:
    rows = [
        {
            "are_different": True, "best_image_uid": f"{number}-0", "caption": f"thing {number}", "has_label": True,
            "image_0_uid": f"{number}-0", "image_1_uid": f"{number}-1", "label_0": 1.0, "label_1": 0.0,
            "jpg_0": picture(number, format="JPEG")[: -200 if number == 3 else None],
            "jpg_1": picture(100 + number, format="JPEG"), "ranking_id": number, "user_id": 1,
        }
        for number in range(9)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    reports = [
        rewrite_pairs(tmp_path / "set.parquet", tmp_path / check, check=check)
        for check in ("decode", "structure")
    ]
    assert [(report.kept, report.quarantined) for report in reports] == [(8, {"truncated or damaged": 1})] * 2
    for name in ("pairs-00000.parquet", "quarantine.jsonl"):
        assert (tmp_path / "decode" / name).read_bytes() == (tmp_path / "structure" / name).read_bytes()
    with pytest.raises(StoreError, match="check differ"):
        rewrite_pairs(tmp_path / "set.parquet", tmp_path / "decode")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an image"),
        (b"this is not an image", "not an image"),
        (jpeg("x")[:10], "not an image"),
        (jpeg("x", size=(64, 64))[:800], "truncated or damaged"),
        (png_header(8, 8), "truncated or damaged"),
        (png_header(8193, 8192), "more than 64 megapixels"),
        (png_header(12000, 12000), "more than 64 megapixels"),
        (png_header(60000, 60000), "more than 64 megapixels"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes, why: str) -> None:
    with pytest.raises(ImportFormatError, match=f"^{why}$"), whole_image(data):
        pass


def test_a_machine_without_memory_is_no_damage_to_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: object, **kwargs: object) -> None:
        raise MemoryError

    data = picture(**FILES["jpeg"])
    monkeypatch.setattr(Image.Image, "convert", exhausted)
    with pytest.raises(MemoryError), whole_image(data):
        pass
    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError), whole_image(data):
        pass


def test_transparency_is_laid_on_white() -> None:
    assert on_white(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_is_turned_as_its_file_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for orientation, turned in (
        (1, pixels),
        (3, pixels[::-1, ::-1]),
        (6, np.rot90(pixels, -1)),
        (8, np.rot90(pixels)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
        np.testing.assert_array_equal(np.array(on_white(Image.open(buffer))), turned)


def test_grey_of_16_bits_keeps_its_greys() -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    shown = np.array(on_white(Image.fromarray(grey)))
    assert shown[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_file_is_shown_as_it_says_or_refused_with_its_name(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    Image.new("1", (5000, 5000)).save(tmp_path / "flood.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:-30])
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {
        "a.tiff": "not an image",
        "flood.png": "more than 16 megapixels",
        "cut.png": "truncated or damaged",
        "pipe.png": "not a regular file",
        "none.png": "No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=f"{name} is no image that can be read .*{reason}"):
            read_image(tmp_path / name)


D50_OF_ADOBE = np.array(
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
D50_OF_SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def adobe_profile() -> bytes:
    """An ICC profile of Adobe RGB's primaries with gamma 563/256, made by hand."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, 563)
    name = b"wide\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249])),
        **{key: xyz(D50_OF_ADOBE[:, at]) for at, key in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, data = struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        table += key + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + b"\0" * (-len(value) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(table) + len(data), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + b"".join(map(number, (0.9642, 1.0, 0.8249)))
    return head + b"\0" * (128 - len(head)) + table + data


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_are_those_of_the_profile(mode: str) -> None:
    pixels = np.array([[[100, 150, 100], [200, 180, 160], [128, 128, 128]]], dtype=np.uint8)
    linear = np.linalg.solve(D50_OF_SRGB, D50_OF_ADOBE @ ((pixels[0] / 255) ** (563 / 256)).T).T
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "PNG", icc_profile=adobe_profile())
    shown = pixels_of(out.getvalue())[0]
    assert np.abs(shown - expected).max() < 2
    assert np.abs(shown[0].astype(int) - pixels[0, 0]).max() > 10


def test_a_profile_that_is_srgb_or_cannot_be_read_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile",
        b"\0" * 5000,
    ):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(pixels_of(out.getvalue()), pixels)
