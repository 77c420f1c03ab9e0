"""Shards: the files the store is made of, their names, and how their rows are written and read.

    samples-<iteration>-r<rank>-u<unit>.parquet          rows of one unit of work
    latents-<iteration>-r<rank>-u<unit>.safetensors      their latents, by sample id
    pairs-<iteration>-r<rank>-u<unit>.parquet            preferences
    samples-<iteration>-p<number>.parquet                rows of many units of a complete stage: a pack
    latents-<iteration>-p<number>.safetensors            their latents, by row

Shards of stages other than collect and pair carry the stage: `samples-0000-offline-r00-u0000.parquet`.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from diffexpo.bounded.texts import parse_json
from diffexpo.data.rows import LATER_COLUMNS
from diffexpo.errors import StoreError
from diffexpo.files import replacing, write_bytes

STAGE_KINDS = {
    "collect": ("latents", "samples"),
    "improve": ("latents", "samples"),
    "pair": ("pairs",),
    "offline": ("latents", "samples", "pairs"),
    "label": ("pairs",),
}
"""Kinds of shard a stage writes for one unit, in this order: once the last one exists, the unit is done."""

_HOME = {"samples": "collect", "latents": "collect", "pairs": "pair"}
_NAME = re.compile(
    r"(?P<kind>samples|latents|pairs)-(?P<iteration>\d{4,})(-(?P<stage>[a-z_]+))?"
    r"-(r(?P<rank>\d{2,})-u(?P<unit>\d{4,})|p(?P<pack>\d{4,}))\.(parquet|safetensors)"
)
_LATENTS_HASH = b"latents_sha256"
_NOTE = b"note"
ROWS_AT_ONCE = 4096
"""Rows of a row group: as many are read to have one of them."""


@dataclass(frozen=True)
class Shard:
    """One file of the store, described by its name: that of a unit, or of a pack, which has no rank and whose
    number is in `unit`."""

    kind: str
    stage: str
    iteration: int
    rank: int | None
    unit: int

    @property
    def name(self) -> str:
        """File name."""
        stage = "" if _HOME[self.kind] == self.stage else f"-{self.stage}"
        suffix = "safetensors" if self.kind == "latents" else "parquet"
        place = f"p{self.unit:04d}" if self.rank is None else f"r{self.rank:02d}-u{self.unit:04d}"
        return f"{self.kind}-{self.iteration:04d}{stage}-{place}.{suffix}"

    @property
    def is_pack(self) -> bool:
        """Whether it holds many units of a complete stage."""
        return self.rank is None

    def sibling(self, kind: str) -> Shard:
        """The shard of another kind of the same unit or pack."""
        return replace(self, kind=kind)

    @staticmethod
    def named(name: str) -> Shard:
        """The shard of a file name that the store itself has listed or written."""
        shard = Shard.parse(name)
        assert shard is not None, name
        return shard

    @staticmethod
    def parse(name: str) -> Shard | None:
        """The shard a file name means, or None when it is not a shard's."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        rank = None if match["rank"] is None else int(match["rank"])
        stage = match["stage"] or _HOME[match["kind"]]
        return Shard(match["kind"], stage, int(match["iteration"]), rank, int(match["unit"] or match["pack"]))


def list_shards(
    root: Path, kind: str | None = None, stage: str | None = None, iteration: int | None = None
) -> list[Shard]:
    """Units on the disk, whole or not yet complete, in reading order; packs are found by their manifests."""
    found = [shard for entry in os.scandir(root) if (shard := Shard.parse(entry.name)) and not shard.is_pack]
    found = [shard for shard in found if kind in (None, shard.kind) and stage in (None, shard.stage)]
    return in_order(shard for shard in found if iteration in (None, shard.iteration))


def in_order(shards: Iterable[Shard]) -> list[Shard]:
    """Shards by iteration, stage and unit, whatever the number of processes."""
    return sorted(
        shards, key=lambda shard: (shard.iteration, shard.stage, shard.unit, shard.rank or 0, shard.kind)
    )


def write_rows(
    path: Path, table: pa.Table, *, latents_sha256: str = "", note: Mapping[str, object] | None = None
) -> None:
    """Write one Parquet shard; `note` is any small JSON that belongs to the unit."""
    buffer = io.BytesIO()
    table = table.replace_schema_metadata(_metadata(latents_sha256, note or {}))
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, row_group_size=ROWS_AT_ONCE)
    write_bytes(path, buffer.getvalue())


def write_tables(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, latents_sha256: str) -> int:
    """Write tables one after another as one Parquet shard, each a row group; returns the number of rows."""
    schema, count = schema.with_metadata(_metadata(latents_sha256, {})), 0
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=ROWS_AT_ONCE)
            count += table.num_rows
    return count


def _metadata(latents_sha256: str, note: Mapping[str, object]) -> dict[bytes | str, bytes | str]:
    return {_NOTE: json.dumps(dict(note), sort_keys=True), _LATENTS_HASH: latents_sha256}


def read_rows(
    path: Path,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    *,
    encoded: Sequence[str] = (),
    group: int | None = None,
) -> pa.Table:
    """Read one Parquet shard; one that is missing, damaged or lacks the store's columns is a StoreError.

    Args:
        columns: What to read; all by default.
        encoded: Columns to read as codes of a dictionary, which is smaller where values repeat.
        group: Only this row group.
    """
    with (
        damage(path),
        pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=list(encoded)) as file,
    ):
        stored = file.schema_arrow
        absent = [field.name for field in schema if field.name not in stored.names]
        missing = [name for name in absent if name not in LATER_COLUMNS]
        types = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in stored}
        wrong = [f.name for f in schema if f.name in types and types[f.name] != f.type]
        if missing or wrong:
            raise StoreError(
                f"{path} does not hold the store's columns (missing: {', '.join(missing) or 'none'}; of "
                f"another type: {', '.join(wrong) or 'none'}): it was written by another version or by "
                f"something else; {advice(path)}"
            )
        wanted = list(columns or schema.names)
        there = [name for name in wanted if name not in absent]
        table = file.read(there) if group is None else file.read_row_group(group, there)
        for name in (name for name in wanted if name in absent):
            nulls = pa.nulls(table.num_rows, schema.field(name).type)
            table = table.append_column(schema.field(name), nulls)
        return table.select(wanted).replace_schema_metadata(None)


def count_groups(path: Path) -> list[int]:
    """Rows of each row group of a Parquet shard."""
    with damage(path):
        metadata = pq.read_metadata(path)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def read_header(path: Path) -> tuple[int, str, dict[str, Any]]:
    """Row count, SHA-256 of the unit's latents file ("" without one) and note of a Parquet shard."""
    with damage(path):
        metadata = pq.read_metadata(path)
    pairs = metadata.metadata or {}
    return metadata.num_rows, pairs.get(_LATENTS_HASH, b"").decode(), parse_json(pairs.get(_NOTE, b"{}"))


@contextmanager
def damage(path: Path, missing: str = "is missing") -> Iterator[None]:
    """Turns what a reader raises on a file that is gone or damaged into one clear error."""
    try:
        yield
    except FileNotFoundError as error:
        raise damaged(path, missing) from error
    except (pa.ArrowException, SafetensorError, OSError, ValueError) as error:
        raise damaged(path, f"is truncated or damaged ({error})") from error


def damaged(path: Path, what: str) -> StoreError:
    """The error that says what is wrong with a file of the store, and what to do."""
    return StoreError(f"{path} {what}; {advice(path)}")


def advice(path: Path) -> str:
    """What to do about a file of the store that is gone or damaged."""
    shard = Shard.parse(path.name)
    if shard is None:
        return "restore it from a copy"
    if shard.stage == "label":
        return "restore it from a copy: it holds people's answers"
    if shard.is_pack:
        return (
            f"restore it from a copy, or delete the packs {shard.stage} {shard.iteration} and manifests/"
            f"{shard.stage}-{shard.iteration:04d}.json (and what was made from them later) and resume: the "
            "stage is made again"
        )
    return (
        f"restore it from a copy, or delete it, {shard.sibling(STAGE_KINDS[shard.stage][-1]).name} and "
        f"manifests/{shard.stage}-{shard.iteration:04d}.json (and what was made from them later) and resume: "
        "the unit is made again"
    )
