"""Files of pictures are whole or not, without a pixel decoded."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffexpo.data.offline import rewrite_pairs
from diffexpo.data.offline.structure import check_structure
from diffexpo.errors import ImportFormatError, StoreError

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
    check_structure(data)
    check_structure(data + b"\0\0")
    for end in range(0, len(data), 7):
        with pytest.raises(ImportFormatError):
            check_structure(data[:end])


def test_a_thumbnails_end_is_not_the_pictures() -> None:
    around = picture(**FILES["jpeg"])
    data = with_thumbnail(picture(1, 8, **FILES["jpeg"]), around)
    check_structure(data)
    with pytest.raises(ImportFormatError, match="truncated"):
        check_structure(data[: len(data) - len(around) // 2])


def test_a_byte_changed_anywhere_in_a_png_is_found() -> None:
    data = picture(**FILES["png"])
    for place in range(len(data)):
        with pytest.raises(ImportFormatError):
            check_structure(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\0\0", b"GIF89a" + bytes(99), b"\xff" * 99],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ImportFormatError):
        check_structure(data)


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
        rewrite_pairs(tmp_path / "set.parquet", tmp_path / "structure")
