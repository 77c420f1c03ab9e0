"""Broken, mutated and hostile preference sets, and what the importers make of them.

    .venv/bin/python benchmarks/hostile_inputs.py --count 300

The inputs are made deterministically from a seed, for every format: good sets whose pictures, prompts, bytes,
paths, columns or archive members were spoilt. Each is read in a child process, every picture decoded, and
then imported as `diffexpo data import` does it, by structure. Both must end within the time limit, in one of
our own errors or with a report that adds up, with at most as many pairs as are good, with every bad row
counted, and within the memory limit (the peak of resident memory above what it was before). Violations are
listed; the result is written to benchmarks/results/hostile_inputs.json.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import random
import select
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

if TYPE_CHECKING:
    from diffexpo.data.offline.votes import ImportReport

Rows = list["Row"]


@dataclass(frozen=True)
class Row:
    """One good pair, or one that was spoilt."""

    caption: object
    pictures: tuple[bytes, bytes]
    name: str


@dataclass(frozen=True)
class Case:
    """One input and what may come of it."""

    name: str
    format: str
    path: str
    most_kept: int
    must_complain: bool


# ---- pictures ----------------------------------------------------------------------------------------------


def picture(draw: random.Random, kind: str = "JPEG", side: int = 32, **options: object) -> bytes:
    image = Image.frombytes("RGB", (side, side), draw.randbytes(3 * side * side))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(kind: str, width: int, height: int, mode: str = "L", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size and holds what is given."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [head, *chunks, (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def spoilt_pictures(draw: random.Random) -> dict[str, bytes]:
    """Bytes that are no usable picture, by name."""
    whole = picture(draw, side=64)
    progressive = picture(draw, side=64, progressive=True)
    scan = progressive[progressive.index(b"\xff\xda") : -2]
    claim = bytearray(whole)
    at = claim.index(b"\xff\xc0") + 5
    claim[at : at + 4] = struct.pack(">HH", 65500, 65500)
    bad_sum = bytearray(flat("PNG", 32, 32))
    bad_sum[29] ^= 255
    return {
        "truncated jpeg": whole[: len(whole) // 2],
        "jpeg without its last bytes": whole[:-40],
        "jpeg header alone": whole[:20],
        "jpeg that claims 65500 x 65500": bytes(claim),
        "jpeg of 3000 scans": progressive[:-2] + scan * 3000 + progressive[-2:],
        "png that claims 60000 x 60000": png(60000, 60000, (b"IDAT", zlib.compress(b"\0"))),
        "png of 21 megapixels": flat("PNG", 5000, 4200),
        "png with a text bomb": png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))), (b"IDAT", b"")),
        "png with a bad checksum": bytes(bad_sum),
        "png cut in its data": flat("PNG", 300, 300, "RGB")[:200],
        "truncated webp": picture(draw, "WEBP", lossless=True)[:-200],
        "gif": flat("GIF", 8, 8),
        "bmp": flat("BMP", 8, 8),
        "tiff": flat("TIFF", 8, 8),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>",
        "an error page": b"<!DOCTYPE html><title>403 Forbidden</title>",
        "random bytes": draw.randbytes(500),
        "no bytes": b"",
        "one byte": b"\xff",
    }


# ---- good sets, one builder a format -----------------------------------------------------------------------


def good_rows(draw: random.Random, count: int = 6) -> Rows:
    return [Row(f"prompt {n}", (picture(draw), picture(draw)), f"pair{n}") for n in range(count)]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_json(path: Path, value: object) -> Path:
    return write(path, json.dumps(value).encode())


def put_pictures(folder: Path, rows: Rows) -> list[list[str]]:
    """Write every picture below a folder; returns their paths from it."""
    names = [[f"images/{row.name}-{side}.jpg" for side in (0, 1)] for row in rows]
    for row, pair in zip(rows, names, strict=True):
        for name, data in zip(pair, row.pictures, strict=True):
            write(folder / name, data)
    return names


def pickapic(folder: Path, rows: Rows) -> Path:
    path = folder / "votes.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "caption": pa.array([row.caption for row in rows], pa.string()),
            "jpg_0": pa.array([row.pictures[0] for row in rows], pa.binary()),
            "jpg_1": pa.array([row.pictures[1] for row in rows], pa.binary()),
            "label_0": pa.array([1.0] * len(rows)),
            "label_1": pa.array([0.0] * len(rows)),
            "has_label": pa.array([True] * len(rows)),
        }
    )
    pq.write_table(table, path, write_page_checksum=True)
    return path


def table_parquet(folder: Path, rows: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.parquet"
    table = pa.table(
        {
            "prompt": pa.array([row.caption for row in rows], pa.string()),
            "winner": pa.array([row.pictures[0] for row in rows], pa.binary()),
            "loser": pa.array([row.pictures[1] for row in rows], pa.binary()),
        }
    )
    pq.write_table(table, path, write_page_checksum=True)
    return path


def table_csv(folder: Path, rows: Rows) -> Path:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["prompt", "image_0", "image_1", "preferred"])
    for row, names in zip(rows, put_pictures(folder, rows), strict=True):
        writer.writerow([row.caption, *names, 0])
    return write(folder / "pairs.csv", text.getvalue().encode(errors="surrogateescape"))


def table_jsonl(folder: Path, rows: Rows) -> Path:
    lines = [
        json.dumps({"prompt": row.caption, "chosen": names[0], "rejected": names[1]})
        for row, names in zip(rows, put_pictures(folder, rows), strict=True)
    ]
    return write(folder / "pairs.jsonl", "".join(f"{line}\n" for line in lines).encode())


def hpdv2(folder: Path, rows: Rows) -> Path:
    entries = [
        {"prompt": row.caption, "human_preference": [1, 0], "file_path": names}
        for row, names in zip(rows, put_pictures(folder, rows), strict=True)
    ]
    write_json(folder / "train.json", entries)
    return folder


def hpdv3(folder: Path, rows: Rows) -> Path:
    entries = [
        {
            "prompt": row.caption,
            "path1": names[0],
            "path2": names[1],
            "confidence": 0.9,
            "model1": "a",
            "model2": "b",
        }
        for row, names in zip(rows, put_pictures(folder, rows), strict=True)
    ]
    write_json(folder / "train.json", entries)
    return folder


def imagerewarddb(folder: Path, rows: Rows) -> Path:
    columns: dict[str, list[object]] = {name: [] for name in ("image_path", "prompt_id", "prompt", "rank")}
    for row, names in zip(rows, put_pictures(folder, rows), strict=True):
        for rank, name in enumerate(names, 1):
            for column, value in zip(columns, (name, row.name, row.caption, rank), strict=True):
                columns[column].append(value)
    kinds = (pa.string(), pa.string(), pa.string(), pa.int64())
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), kinds, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), folder / "metadata-train.parquet")
    return folder


def pair_folders(folder: Path, rows: Rows) -> Path:
    for row in rows:
        for role, data in zip(("winner", "loser"), row.pictures, strict=True):
            write(folder / row.name / f"{role}.jpg", data)
        if row.caption is not None:
            write(folder / row.name / "prompt.txt", str(row.caption).encode(errors="surrogateescape"))
    return folder


def role_folders(folder: Path, rows: Rows) -> Path:
    lines = []
    for row in rows:
        for role, data in zip(("winners", "losers"), row.pictures, strict=True):
            write(folder / role / f"{row.name}.jpg", data)
        lines.append(json.dumps({"name": row.name, "prompt": row.caption}) + "\n")
    write(folder / "prompts.jsonl", "".join(lines).encode())
    return folder


def webdataset(folder: Path, rows: Rows) -> Path:
    members = []
    for row in rows:
        members += [
            (f"{row.name}.{role}.jpg", data)
            for role, data in zip(("winner", "loser"), row.pictures, strict=True)
        ]
        if row.caption is not None:
            members.append((f"{row.name}.txt", str(row.caption).encode(errors="surrogateescape")))
    return tar_of(folder / "pairs.tar", members)


def tar_of(path: Path, members: Sequence[tuple[str, bytes]], special: Sequence[tarfile.TarInfo] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info in special:
            tar.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


BUILDERS: dict[str, tuple[str, Callable[[Path, Rows], Path]]] = {
    "pickapic": ("pickapic", pickapic),
    "table_parquet": ("table", table_parquet),
    "table_csv": ("table", table_csv),
    "table_jsonl": ("table", table_jsonl),
    "hpdv2": ("hpdv2", hpdv2),
    "hpdv3": ("hpdv3", hpdv3),
    "imagerewarddb": ("imagerewarddb", imagerewarddb),
    "pair_folders": ("folders", pair_folders),
    "role_folders": ("folders", role_folders),
    "webdataset": ("webdataset", webdataset),
}
INDEX = {
    "pickapic": "votes.parquet", "table_parquet": "pairs.parquet", "table_csv": "pairs.csv",
    "table_jsonl": "pairs.jsonl", "hpdv2": "train.json", "hpdv3": "train.json",
    "imagerewarddb": "metadata-train.parquet", "role_folders": "prompts.jsonl", "webdataset": "pairs.tar",
}  # fmt: skip
# A cut at the end of a line leaves a shorter file that is whole: nothing can tell.
CUT_SHOWS = ("pickapic", "table_parquet", "hpdv2", "hpdv3", "imagerewarddb", "webdataset")

Maker = Callable[[Path, random.Random], Case]


def with_spoilt_picture(builder: str, kind: str) -> Maker:
    def make(folder: Path, draw: random.Random) -> Case:
        rows = good_rows(draw)
        at, side = draw.randrange(6), draw.randrange(2)
        pictures = list(rows[at].pictures)
        pictures[side] = spoilt_pictures(draw)[kind]
        rows[at] = replace(rows[at], pictures=(pictures[0], pictures[1]))
        form, build = BUILDERS[builder]
        return Case(f"{builder}: {kind}", form, str(build(folder, rows)), 5, True)

    return make


def with_spoilt_caption(builder: str, kind: str) -> Maker:
    def make(folder: Path, draw: random.Random) -> Case:
        caption = {
            "empty": "",
            "spaces": " \t ",
            "absent": None,
            "5 MB": "word " * 10**6,
            "zero bytes": "a\0b",
        }[kind]
        rows = good_rows(draw)
        at = draw.randrange(6)
        rows[at] = replace(rows[at], caption=caption)
        form, build = BUILDERS[builder]
        path = build(folder, rows)
        # a line of 5 MB ends the reading of a line-based file: what stands behind it is counted as one
        # stretch
        return Case(f"{builder}: caption {kind}", form, str(path), 5, True)

    return make


def with_same_pictures(builder: str) -> Maker:
    def make(folder: Path, draw: random.Random) -> Case:
        rows = good_rows(draw)
        rows[2] = replace(rows[2], pictures=(rows[2].pictures[0],) * 2)
        form, build = BUILDERS[builder]
        return Case(f"{builder}: twice the same picture", form, str(build(folder, rows)), 5, True)

    return make


def with_mutated_bytes(builder: str, kind: str) -> Maker:
    def make(folder: Path, draw: random.Random) -> Case:
        form, build = BUILDERS[builder]
        path = build(folder, good_rows(draw))
        index = path if path.is_file() else path / INDEX[builder]
        data = bytearray(index.read_bytes())
        most, complains = 6, False
        if kind == "cut":
            data = data[: draw.randrange(len(data) // 10, len(data) - 1)]
            complains = builder in CUT_SHOWS
        elif kind == "flipped":
            for _ in range(draw.randrange(1, 20)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == "hole":
            start = draw.randrange(len(data))
            data[start : start + 600] = bytes(len(data[start : start + 600]))
        elif kind == "inserted":
            start = draw.randrange(len(data))
            data[start:start] = draw.randbytes(draw.randrange(1, 200))
        elif kind == "empty":
            data, complains, most = bytearray(), True, 0
        elif kind == "noise":
            data, complains, most = bytearray(draw.randbytes(5000)), True, 0
        elif kind == "utf16":
            data, complains, most = bytearray(data.decode("latin-1").encode("utf-16")), True, 0
        elif kind == "doubled":
            data, most = data + data, 12
        index.write_bytes(bytes(data))
        return Case(f"{builder}: bytes {kind}", form, str(path), most, complains)

    return make


# ---- special cases -----------------------------------------------------------------------------------------


def rewritten(
    builder: str, name: str, change: Callable[[Path, Path, random.Random], tuple[int, bool]]
) -> Maker:
    """A good set that `change(path, index, draw)` spoils; it returns (most kept, must complain)."""

    def make(folder: Path, draw: random.Random) -> Case:
        form, build = BUILDERS[builder]
        path = build(folder, good_rows(draw))
        most, complains = change(path, path if path.is_file() else path / INDEX.get(builder, ""), draw)
        return Case(f"{builder}: {name}", form, str(path), most, complains)

    return make


def parquet_change(
    edit: Callable[[pa.Table], pa.Table], most: int
) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        pq.write_table(edit(pq.read_table(index)), index)
        return most, True

    return change


def column(
    name: str, values: Sequence[object], kind: pa.DataType | None = None
) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def json_change(
    edit: Callable[[list[dict[str, object]]], object], most: int
) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        write_json(index, edit(json.loads(index.read_text())))
        return most, True

    return change


def first(**values: object) -> Callable[[list[dict[str, object]]], object]:
    return lambda entries: [entries[0] | values, *entries[1:]]


def raw(data: bytes, most: int = 0) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        index.write_bytes(data)
        return most, True

    return change


def file_change(
    edit: Callable[[Path], object], most: int = 5
) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        edit(path if path.is_dir() else path.parent)
        return most, True

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> object:
        (folder / name).unlink()
        return make(folder / name)

    return edit


def parquet_bomb(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
    table = pq.read_table(index)
    zeros = pa.array([bytes(15 * 2**20)] * 6, pa.binary())
    bomb = table.set_column(table.column_names.index("jpg_0"), "jpg_0", zeros)
    pq.write_table(bomb, index, compression="zstd", use_dictionary=False)
    return 0, True


def dictionary_bomb(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
    value, count = draw.randbytes(2**21), 300
    pictures = pa.DictionaryArray.from_arrays(
        pa.array([0] * count, pa.int32()), pa.array([value], pa.binary())
    )
    table = pa.table(
        {
            "caption": ["a"] * count, "jpg_0": pictures, "jpg_1": pictures.cast(pa.binary()).slice(0, count),
            "label_0": [1.0] * count, "label_1": [0.0] * count,
        }
    )  # fmt: skip
    schema = pa.schema(
        [(n, pa.binary() if n.startswith("jpg") else table.schema.field(n).type) for n in table.column_names]
    )
    with pq.ParquetWriter(index, schema, dictionary_pagesize_limit=2**26, use_dictionary=True) as writer:
        writer.write_table(table.cast(schema))
    return 0, True


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def tar_change(
    special: Sequence[tarfile.TarInfo], most: int = 6
) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    """Members without contents in front of a good tar."""

    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        front = b"".join(info.tobuf(tarfile.GNU_FORMAT) for info in special)
        index.write_bytes(front + index.read_bytes())
        return most, True

    return change


def negative_size(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
    block = bytearray(header("a.txt").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" + (2**88 - 1024).to_bytes(11, "big")
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    index.write_bytes(bytes(block) + index.read_bytes())
    return 6, True


def added_to_tar(
    *members: tuple[str, bytes], most: int = 6
) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        with tarfile.open(index, "a") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return most, True

    return change


def cut_tar(keep_end: bool) -> Callable[[Path, Path, random.Random], tuple[int, bool]]:
    def change(path: Path, index: Path, draw: random.Random) -> tuple[int, bool]:
        with tarfile.open(index) as tar:
            cut = tar.getmembers()[9].offset
        data = index.read_bytes()[:cut]
        index.write_bytes(data + (bytes(1024) + b"more" if keep_end else b""))
        return 3, True

    return change


def large_but_good(kind: str, width: int, height: int, mode: str) -> Maker:
    def make(folder: Path, draw: random.Random) -> Case:
        rows = good_rows(draw)
        rows[0] = replace(rows[0], pictures=(flat(kind, width, height, mode), rows[0].pictures[1]))
        return Case(
            f"pickapic: a good {kind} of {width} x {height}",
            "pickapic",
            str(pickapic(folder, rows)),
            6,
            False,
        )

    return make


def odd_source(name: str, make_path: Callable[[Path], Path]) -> Maker:
    def make(folder: Path, draw: random.Random) -> Case:
        folder.mkdir(parents=True, exist_ok=True)
        return Case(f"source: {name}", "auto", str(make_path(folder)), 0, True)

    return make


def _made(path: Path, act: Callable[[Path], object]) -> Path:
    act(path)
    return path


PICTURE = "images/pair0-0.jpg"
OUTSIDE = "/etc/hostname"
NESTED = b"[" * 100_000 + b"]" * 100_000

SPECIAL: list[Maker] = [
    rewritten("pickapic", "labels are text", parquet_change(column("label_0", ["1"] * 6), 0)),
    rewritten("pickapic", "labels NaN, inf, 2", parquet_change(column("label_0", [float("nan"), float("inf"), 2.0, -1.0, 1.0, 1.0]), 2)),
    rewritten("pickapic", "labels empty", parquet_change(column("label_0", [None] * 5 + [1.0], pa.float64()), 1)),
    rewritten("pickapic", "caption and picture change places", parquet_change(lambda t: t.rename_columns(["jpg_0", "caption", *t.column_names[2:]]), 0)),
    rewritten("pickapic", "a column is missing", parquet_change(lambda t: t.drop_columns(["jpg_1"]), 0)),
    rewritten("pickapic", "captions are binary", parquet_change(column("caption", [b"\xff\xfe"] * 6), 0)),
    rewritten("pickapic", "captions are lists", parquet_change(column("caption", [["a"]] * 6), 0)),
    rewritten("pickapic", "pictures are paths", parquet_change(column("jpg_0", ["../../etc/passwd"] * 6), 0)),
    rewritten("pickapic", "pictures are structs without bytes", parquet_change(column("jpg_0", [{"bytes": None, "path": "/etc/passwd"}] * 6), 0)),
    rewritten("pickapic", "a column twice", parquet_change(lambda t: pa.Table.from_arrays([*t.columns, t["caption"]], names=[*t.column_names, "caption"]), 0)),
    rewritten("pickapic", "one uid for two pictures", parquet_change(lambda t: t.append_column("image_0_uid", [["x"] * 6]).append_column("image_1_uid", [["x"] * 6]), 0)),
    rewritten("pickapic", "best_image_uid names the loser", parquet_change(lambda t: t.append_column("image_0_uid", [["x"] * 6]).append_column("image_1_uid", [["y"] * 6]).append_column("best_image_uid", [["y"] * 6]), 0)),
    rewritten("pickapic", "no rows", lambda p, i, d: (pq.write_table(pq.read_table(i).slice(0, 0), i), (0, False))[1]),
    rewritten("pickapic", "a row group of zeros", parquet_bomb),
    rewritten("pickapic", "a dictionary of one large value", dictionary_bomb),
    rewritten("pickapic", "invalid UTF-8 in a text column", lambda p, i, d: (pq.write_table(pq.read_table(i).set_column(0, "caption", pa.Array.from_buffers(pa.string(), 6, pa.array([b"\xff\xfe"] * 6).buffers())), i), (0, True))[1]),
    rewritten("table_csv", "latin-1", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"prompt 3", b"caf\xe9")), (5, True))[1]),
    rewritten("table_csv", "a line of 2 MB", lambda p, i, d: (i.write_bytes(i.read_bytes() + b"x" * 2**21 + b",a,b,0\n"), (6, True))[1]),
    rewritten("table_csv", "2 MB of commas", lambda p, i, d: (i.write_bytes(i.read_bytes() + b"," * 2**20 + b"\n"), (6, True))[1]),
    rewritten("table_csv", "an open quote", lambda p, i, d: (i.write_bytes(i.read_bytes() + b'"open,a,b,0\n' * 3), (6, True))[1]),
    rewritten("table_csv", "cells too many", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"pair0-1.jpg,0", b"pair0-1.jpg,0,0")), (5, True))[1]),
    rewritten("table_csv", "a semicolon for a comma", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b",", b";")), (0, True))[1]),
    rewritten("table_csv", "a column twice", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"image_1", b"image_0")), (0, True))[1]),
    rewritten("table_csv", "URLs", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"images/pair0-0", b"http://localhost/x")), (5, True))[1]),
    rewritten("table_csv", "a file URL", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"images/pair0-0", b"file:///etc/hostname")), (5, True))[1]),
    rewritten("table_csv", "an absolute path", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"images/pair0-0.jpg", OUTSIDE.encode())), (5, True))[1]),
    rewritten("table_csv", "a path that climbs", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"images/pair0-0.jpg", b"../" * 20 + b"etc/hostname")), (5, True))[1]),
    rewritten("table_csv", "a path that climbs with backslashes", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"images/pair0-0.jpg", b"..\\..\\secret")), (5, True))[1]),
    rewritten("table_csv", "a name of 5,000 letters", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"images/pair0-0.jpg", b"x" * 5000)), (5, True))[1]),
    rewritten("table_csv", "preferred is a word", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"pair0-1.jpg,0", b"pair0-1.jpg,left")), (5, True))[1]),
    rewritten("table_csv", "label instead of preferred", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"preferred", b"label")), (0, True))[1]),
    rewritten("table_csv", "a missing picture", file_change(lambda f: (f / PICTURE).unlink())),
    rewritten("table_csv", "a picture that is a link outside", file_change(replaced(PICTURE, lambda p: p.symlink_to(OUTSIDE)))),
    rewritten("table_csv", "a picture that links to itself", file_change(replaced(PICTURE, lambda p: p.symlink_to(p)))),
    rewritten("table_csv", "a picture that is a pipe", file_change(replaced(PICTURE, lambda p: os.mkfifo(p)))),
    rewritten("table_csv", "a picture that is a folder", file_change(replaced(PICTURE, lambda p: p.mkdir()))),
    rewritten("table_csv", "a picture that is /dev/zero", file_change(replaced(PICTURE, lambda p: p.symlink_to("/dev/zero")))),
    rewritten("table_csv", "a picture that is a hole of 1 GB", file_change(replaced(PICTURE, lambda p: (p.touch(), os.truncate(p, 2**30))))),
    rewritten("table_jsonl", "deep nesting", lambda p, i, d: (i.write_bytes(i.read_bytes() + NESTED + b"\n"), (6, True))[1]),
    rewritten("table_jsonl", "half a surrogate pair", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b"prompt 1", b"\\ud800")), (5, True))[1]),
    rewritten("table_jsonl", "a number of 10,000 digits", lambda p, i, d: (i.write_bytes(i.read_bytes().replace(b'"prompt 1"', b"9" * 10_000)), (5, True))[1]),
    rewritten("table_jsonl", "a line of 3 MB", lambda p, i, d: (i.write_bytes(i.read_bytes() + b"[" + b"[]," * 10**6 + b"[]]\n"), (6, True))[1]),
    rewritten("table_jsonl", "lists for objects", lambda p, i, d: (i.write_bytes(i.read_bytes() + b"[1]\nnull\n3\n"), (6, True))[1]),
    rewritten("hpdv2", "a dictionary for a list", json_change(lambda e: {"data": e}, 0)),
    rewritten("hpdv2", "deep nesting", raw(NESTED)),
    rewritten("hpdv2", "8 MB of white space", lambda p, i, d: (i.write_bytes(b"[" + b" " * 2**23 + i.read_bytes()[1:-1] + b",]"), (6, True))[1]),
    rewritten("hpdv2", "both preferred", json_change(first(human_preference=[1, 1]), 5)),
    rewritten("hpdv2", "preferences of another length", json_change(first(human_preference=[1]), 5)),
    rewritten("hpdv2", "preferences are words", json_change(first(human_preference=["a", "b"]), 5)),
    rewritten("hpdv2", "100,000 pictures in one ranking", json_change(first(human_preference=[0] * 10**5, file_path=["x"] * 10**5), 5)),
    rewritten("hpdv2", "paths are numbers", json_change(first(file_path=[1, 2]), 5)),
    rewritten("hpdv2", "paths climb", json_change(first(file_path=["../../../etc/hostname", "/etc/hostname"]), 5)),
    rewritten("hpdv2", "elements are not objects", json_change(lambda e: [*e, None, 3, "x", []], 6)),
    rewritten("hpdv2", "an element of 3 MB", json_change(lambda e: [e[0], e[1] | {"more": [[]] * 10**6}, *e[2:]], 5)),
    rewritten("hpdv3", "paths climb", json_change(first(path1="../../../../../../etc/hostname"), 5)),
    rewritten("hpdv3", "a path is missing", json_change(lambda e: [{k: v for k, v in e[0].items() if k != "path2"}, *e[1:]], 5)),
    rewritten("hpdv3", "confidence is a list", json_change(lambda e: [e[0] | {"confidence": [[]], "path1": None}, *e[1:]], 5)),
    rewritten("imagerewarddb", "one id for all rows", parquet_change(column("prompt_id", ["p"] * 12), 1)),
    rewritten("imagerewarddb", "ranks are words", parquet_change(column("rank", ["1"] * 12), 0)),
    rewritten("imagerewarddb", "equal ranks", parquet_change(column("rank", [1] * 12), 0)),
    rewritten("imagerewarddb", "one picture for all rows", parquet_change(column("image_path", [PICTURE] * 12), 0)),
    rewritten("imagerewarddb", "paths climb", parquet_change(column("image_path", [f"../{n}" for n in range(12)]), 0)),
    rewritten("imagerewarddb", "no ids", parquet_change(column("prompt_id", [None] * 12, pa.string()), 0)),
    rewritten("imagerewarddb", "a prompt of 3,000 pictures", parquet_change(lambda t: pa.table({"image_path": [f"{n}.jpg" for n in range(3000)], "prompt_id": ["p"] * 3000, "prompt": ["a"] * 3000, "rank": list(range(3000))}), 0)),
    rewritten("pair_folders", "no winner", file_change(lambda f: (f / "pair0/winner.jpg").unlink())),
    rewritten("pair_folders", "two winners", file_change(lambda f: (f / "pair0/winner.png").write_bytes(b"x"))),
    rewritten("pair_folders", "a prompt that is not UTF-8", file_change(lambda f: (f / "pair0/prompt.txt").write_bytes(b"\xff\xfe\xe9"))),
    rewritten("pair_folders", "a prompt of 1 GB of nothing", file_change(lambda f: os.truncate(f / "pair0/prompt.txt", 2**30))),
    rewritten("pair_folders", "a prompt that is a folder", file_change(replaced("pair0/prompt.txt", lambda p: p.mkdir()))),
    rewritten("pair_folders", "a loser that is a pipe", file_change(replaced("pair0/loser.jpg", lambda p: os.mkfifo(p)))),
    rewritten("pair_folders", "a winner that is a link outside", file_change(replaced("pair0/winner.jpg", lambda p: p.symlink_to(OUTSIDE)))),
    rewritten("pair_folders", "an empty folder more", file_change(lambda f: (f / "more").mkdir(), 6)),
    rewritten("pair_folders", "a name that is not UTF-8", file_change(lambda f: os.mkdir(os.fsencode(f) + b"/\xff\xfe"), 6)),
    rewritten("role_folders", "a name twice", file_change(lambda f: (f / "prompts.jsonl").open("a").write('{"name": "pair0", "prompt": "again"}\n'), 6)),
    rewritten("role_folders", "a picture without a prompt", file_change(lambda f: (f / "winners/more.jpg").write_bytes(b"x"), 6)),
    rewritten("role_folders", "a name that climbs", file_change(lambda f: (f / "prompts.jsonl").open("a").write('{"name": "../losers/pair0", "prompt": "x"}\n'), 6)),
    rewritten("role_folders", "no losers", file_change(lambda f: (f / "losers").rename(f / "gone"), 0)),
    rewritten("webdataset", "names that climb", added_to_tar(("../../etc/cron.d/x.winner.jpg", b"x"), ("/etc/x.txt", b"x"))),
    rewritten("webdataset", "links and devices", tar_change([header("x.winner.jpg", tarfile.SYMTYPE, link=OUTSIDE), header("y.winner.jpg", tarfile.LNKTYPE, link="/etc/passwd"), header("z.jpg", tarfile.CHRTYPE), header("p.jpg", tarfile.FIFOTYPE)])),
    rewritten("webdataset", "a member that claims 8 TB", tar_change([header("x.winner.jpg", size=2**43)], 0)),
    rewritten("webdataset", "a member that points backwards", negative_size),
    rewritten("webdataset", "a key twice", added_to_tar(("pair0.winner.jpg", b"x"), ("pair0.txt", b"again"))),
    rewritten("webdataset", "a text of 1 MB", added_to_tar(("big.txt", b"x" * 2**20))),
    rewritten("webdataset", "JSON that is none", added_to_tar(("n.json", b"{"), ("m.json", NESTED), ("o.json", b"[1]"))),
    rewritten("webdataset", "a key of 5,000 letters", added_to_tar(("k" * 5000 + ".txt", b"x"))),
    rewritten("webdataset", "no end mark", cut_tar(False)),
    rewritten("webdataset", "data behind the end mark", cut_tar(True)),
    rewritten("webdataset", "compressed", lambda p, i, d: (i.write_bytes(zlib.compress(i.read_bytes())), (0, True))[1]),
    large_but_good("JPEG", 8000, 8000, "L"),
    large_but_good("PNG", 4000, 4000, "RGB"),
    odd_source("nothing", lambda f: f / "none"),
    odd_source("an empty folder", lambda f: f),
    odd_source("a pipe", lambda f: _made(f / "pipe.parquet", lambda p: os.mkfifo(p))),
    odd_source("a dead link", lambda f: _made(f / "dead.parquet", lambda p: p.symlink_to("gone"))),
    odd_source("a link to itself", lambda f: _made(f / "loop.parquet", lambda p: p.symlink_to(p))),
    odd_source("a folder with a pipe", lambda f: _made(f / "x.parquet", lambda p: os.mkfifo(p)).parent),
    odd_source("/dev/zero by another name", lambda f: _made(f / "z.csv", lambda p: p.symlink_to("/dev/zero"))),
    odd_source("an unknown ending", lambda f: write(f / "set.xyz", b"hello")),
]  # fmt: skip


def makers(count: int, seed: int) -> Iterator[Maker]:
    """The special cases, then every other mixture of format and damage in an order drawn from the seed."""
    draw = random.Random(f"order {seed}")
    kinds = list(spoilt_pictures(random.Random(0)))
    rest: list[Maker] = [with_spoilt_picture(builder, kind) for builder in BUILDERS for kind in kinds]
    rest += [with_same_pictures(builder) for builder in BUILDERS]
    captions = ("empty", "spaces", "absent", "5 MB", "zero bytes")
    rest += [with_spoilt_caption(builder, kind) for builder in BUILDERS for kind in captions]
    mutations = ("cut", "flipped", "hole", "inserted", "empty", "noise", "utf16", "doubled")
    mutated = [with_mutated_bytes(builder, kind) for builder in INDEX for kind in mutations]
    draw.shuffle(rest)
    draw.shuffle(mutated)
    special = list(SPECIAL)
    if count < len(special):
        draw.shuffle(special)
    mixed = [maker for pair in zip(mutated, rest, strict=False) for maker in pair]
    mixed += [*rest[len(mutated) :], *mutated[len(rest) :]]
    flips = [with_mutated_bytes(builder, "flipped") for builder in INDEX]
    ordered = special + mixed
    while len(ordered) < count:
        ordered += flips
    yield from ordered[:count]


def make_inputs(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """The cases one after another; each input lies in its own folder and is made when it is asked for."""
    for number, maker in enumerate(makers(count, seed)):
        yield maker(folder / f"{number:03d}", random.Random(f"case {seed} {number}"))


# ---- the child that imports --------------------------------------------------------------------------------


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def read_one(path: str, form: str, report: ImportReport) -> None:
    """Every pair, its pictures decoded."""
    from diffexpo.data.offline.formats import read_offline

    for pair in read_offline(path, report, format=form):
        assert pair.caption and pair.winner_jpg and pair.loser_jpg


def rewrite_one(path: str, form: str, report: ImportReport) -> None:
    """An import into a folder."""
    from diffexpo.data.offline.writing import rewrite_pairs

    with tempfile.TemporaryDirectory() as folder:
        found = rewrite_pairs(path, Path(folder) / "to", format=form)
    vars(report).update(vars(found))


WAYS: dict[str, Callable[[str, str, ImportReport], None]] = {"read": read_one, "import": rewrite_one}


def import_one(path: str, form: str, way: str) -> dict[str, object]:
    """What one import came to; peak memory is counted from its start."""
    import gc

    from diffexpo.data.offline.votes import ImportReport
    from diffexpo.errors import DiffexpoError

    gc.collect()
    pa.default_memory_pool().release_unused()
    Path("/proc/self/clear_refs").write_text("5")
    before, began, report = memory("VmRSS"), time.perf_counter(), ImportReport()
    outcome = "read"
    try:
        WAYS[way](path, form, report)
    except DiffexpoError as error:
        outcome = type(error).__name__
        message = str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
        outcome = f"CRASH {type(error).__name__}: {error}"[:300]
    return {
        "outcome": outcome,
        "message": message[:300] if outcome.endswith("Error") and "CRASH" not in outcome else "",
        "kept": report.kept,
        "report": report.to_json(),
        "seconds": time.perf_counter() - began,
        "growth": memory("VmHWM") - before,
    }


def work() -> None:
    """Answer one line of JSON for each line of JSON until the input ends."""
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(import_one(task["path"], task["format"], task["way"])), flush=True)


class Child:
    """The importing process; started anew when it dies or hangs."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, path: str, form: str, way: str, limit_s: float) -> dict[str, object]:
        if self.process is None:
            command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self.process
        assert process.stdin is not None and process.stdout is not None  # asked for above
        process.stdin.write((json.dumps({"path": path, "format": form, "way": way}) + "\n").encode())
        process.stdin.flush()
        line = b""
        if select.select([process.stdout], [], [], limit_s)[0]:
            line = process.stdout.readline()
        if line:
            return json.loads(line)
        is_hung = process.poll() is None
        self.close()
        return {"outcome": f"HANG beyond {limit_s:g} s" if is_hung else "CRASH of the process"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def violations(case: Case, result: dict[str, object], growth_limit: int) -> list[str]:
    """What must not be, in words."""
    outcome = str(result["outcome"])
    if outcome.startswith(("CRASH", "HANG")):
        return [outcome]
    found = []
    report = result["report"]
    assert isinstance(report, dict)
    bad = sum(report["quarantined"].values())
    counted = report["kept"] + report["ties"] + report["unlabelled"] + report["unselected"] + bad
    if outcome == "read" and report["read"] != counted:
        found.append(f"{report['read']} rows read, {counted} counted")
    if result["kept"] > case.most_kept:
        found.append(f"{result['kept']} pairs kept, {case.most_kept} are good")
    if case.must_complain and outcome == "read" and not bad + report["ties"]:
        found.append("silently accepted")
    if result["growth"] > growth_limit:
        found.append(f"memory grew by {result['growth'] / 2**20:.0f} MiB")
    return found


def warm_up(child: Child, path: Path) -> None:
    """Have it import what every import needs, so that this is not counted as growth."""
    for way in WAYS:
        child.ask(str(path), "pickapic", way, 120.0)


def run(
    count: int, seed: int, limit_s: float = 20.0, growth_limit: int = 100 * 2**20
) -> list[dict[str, object]]:
    """Import every case in both ways; returns description, outcome and violations of each."""
    child, rows = Child(), []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        warm = pickapic(root / "warm", good_rows(random.Random(0)))
        warm_up(child, warm)
        for number, case in enumerate(make_inputs(root, count, seed)):
            form = "auto" if number % 2 else case.format
            for way in WAYS:
                result = child.ask(case.path, form, way, limit_s)
                if child.process is None:
                    warm_up(child, warm)
                found = violations(case, result, growth_limit)
                rows.append(
                    asdict(case) | result | {"way": way, "violations": found, "path": Path(case.path).name}
                )
    child.close()
    return rows


def summary(row: dict[str, object]) -> dict[str, object]:
    """A case in one line of the results file."""
    report = row.get("report") or {}
    assert isinstance(report, dict)
    return {
        "name": row["name"],
        "way": row["way"],
        "outcome": row["outcome"],
        "kept": row.get("kept", 0),
        "most_kept": row["most_kept"],
        "bad": report.get("quarantined", {}),
        "seconds": round(float(row.get("seconds", 0.0)), 3),
        "growth_mib": round(int(row.get("growth", 0)) / 2**20, 1),
        "violations": row["violations"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=20.0, help="time limit of one import")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hostile_inputs.json")
    options = parser.parse_args()
    if options.worker:
        work()
        return
    rows = run(options.count, options.seed, options.limit_s)
    broken = [row for row in rows if row["violations"]]
    for row in broken:
        print(f"{row['name']} ({row['way']}): {'; '.join(map(str, row['violations']))}")
    outcomes = Counter(str(row["outcome"]).split(":")[0] for row in rows)
    result = {
        "inputs": len(rows) // len(WAYS),
        "imports": len(rows),
        "violations": len(broken),
        "outcomes": dict(outcomes),
        "slowest_s": max(float(row.get("seconds", options.limit_s)) for row in rows),
        "largest_growth_mib": max(int(row.get("growth", 0)) for row in rows) / 2**20,
        "seed": options.seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(summary(row))}" for row in rows)
    options.out.write_text(f'{json.dumps(result, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    print(
        f"{result['inputs']} inputs, {len(rows)} imports: {dict(outcomes)}; {len(broken)} violations; "
        f"slowest {result['slowest_s']:.2f} s, largest memory "
        f"growth {result['largest_growth_mib']:.0f} MiB"
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
