"""Shards: the files the store is made of, their names, and how one is written and read.

    samples-<iteration>-r<rank>-u<unit>.parquet          rows of one unit of work
    latents-<iteration>-r<rank>-u<unit>.safetensors      their latents, by sample id
    pairs-<iteration>-r<rank>-u<unit>.parquet            preferences

Shards of stages other than collect and pair carry the stage: `samples-0000-offline-r00-u0000.parquet`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffexpo.data.rows import LATER_COLUMNS
from diffexpo.errors import StoreError
from diffexpo.files import write_bytes

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
    r"(?P<kind>samples|latents|pairs)-(?P<iteration>\d{4,})(-(?P<stage>[a-z_]+))?-r(?P<rank>\d{2,})"
    r"-u(?P<unit>\d{4,})\.(parquet|safetensors)"
)
_LATENTS_HASH = b"latents_sha256"
_NOTE = b"note"


@dataclass(frozen=True)
class Shard:
    """One file of the store, described by its name."""

    kind: str
    stage: str
    iteration: int
    rank: int
    unit: int

    @property
    def name(self) -> str:
        """File name."""
        stage = "" if _HOME[self.kind] == self.stage else f"-{self.stage}"
        suffix = "safetensors" if self.kind == "latents" else "parquet"
        return f"{self.kind}-{self.iteration:04d}{stage}-r{self.rank:02d}-u{self.unit:04d}.{suffix}"

    @property
    def order(self) -> tuple[int, str, int, int]:
        """Its rows' place among all: by iteration, stage and unit, whatever the number of processes."""
        return (self.iteration, self.stage, self.unit, self.rank)

    def sibling(self, kind: str) -> Shard:
        """The shard of another kind of the same unit."""
        return Shard(kind, self.stage, self.iteration, self.rank, self.unit)

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
        iteration, rank, unit = (int(match[name]) for name in ("iteration", "rank", "unit"))
        return Shard(match["kind"], match["stage"] or _HOME[match["kind"]], iteration, rank, unit)


def list_shards(
    root: Path, kind: str | None = None, stage: str | None = None, iteration: int | None = None
) -> list[Shard]:
    """Shards that are on the disk, whole or not yet complete as a unit, in reading order."""
    found = [shard for entry in os.scandir(root) if (shard := Shard.parse(entry.name))]
    wanted = [
        shard
        for shard in found
        if kind in (None, shard.kind)
        and stage in (None, shard.stage)
        and iteration in (None, shard.iteration)
    ]
    return sorted(wanted, key=lambda shard: (shard.order, shard.kind))


def check_latents(ids: Sequence[str], latents: Mapping[str, np.ndarray]) -> None:
    """Raise a StoreError unless there is one float array (C,h,w) for each sample id."""
    extra, missing = sorted(set(latents) - set(ids)), [i for i in ids if i not in latents]
    if extra or missing:
        raise StoreError(
            f"latents and samples differ: without latents {missing[:3]}, without a row {extra[:3]}"
        )
    for sample_id in ids:
        array = latents[sample_id]
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f":
            raise StoreError(
                f"latents of {sample_id!r} are {array!r:.80}; they must be a float array (C,h,w)"
            )


def write_latents(path: Path, latents: Mapping[str, np.ndarray]) -> str:
    """Write arrays by sample id, bit for bit; returns the file's SHA-256."""
    # safetensors copies raw memory: an array that is a view would be written in the wrong order
    data = save(
        {key: np.ascontiguousarray(array) for key, array in latents.items()}, {"format": "diffexpo-latents-1"}
    )
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


class LatentFile:
    """A memory-mapped latents shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _damage(path, "is missing although its samples are in the store"):
            file: Any = safe_open(str(path), framework="numpy")
        self._file = file
        self._names = frozenset(file.keys())

    def names(self) -> frozenset[str]:
        """Sample ids in the file."""
        return self._names

    def read(self, sample_id: str) -> np.ndarray:
        """A copy of one sample's latents (C,h,w)."""
        if sample_id not in self._names:
            raise StoreError(
                f"{self.path} does not hold the latents of sample {sample_id!r}; {_advice(self.path)}"
            )
        return self._file.get_tensor(sample_id)


def write_rows(
    path: Path, table: pa.Table, *, latents_sha256: str = "", note: Mapping[str, object] | None = None
) -> None:
    """Write one Parquet shard; `note` is any small JSON that belongs to the unit."""
    metadata = {
        _NOTE: json.dumps(dict(note or {}), sort_keys=True).encode(),
        _LATENTS_HASH: latents_sha256.encode(),
    }
    buffer = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata), buffer, compression="zstd", write_page_checksum=True
    )
    write_bytes(path, buffer.getvalue())


def read_rows(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet shard; one that is missing, damaged or lacks the store's columns is a StoreError."""
    with _damage(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        stored = file.schema_arrow
        absent = [field.name for field in schema if field.name not in stored.names]
        missing = [name for name in absent if name not in LATER_COLUMNS]
        wrong = [f.name for f in schema if f.name in stored.names and stored.field(f.name).type != f.type]
        if missing or wrong:
            raise StoreError(
                f"{path} does not hold the store's columns (missing: {', '.join(missing) or 'none'}; of "
                f"another type: {', '.join(wrong) or 'none'}): it was written by another version or by "
                f"something else; {_advice(path)}"
            )
        wanted = list(columns or schema.names)
        table = file.read([name for name in wanted if name not in absent])
        for name in (name for name in wanted if name in absent):
            nulls = pa.nulls(file.metadata.num_rows, schema.field(name).type)
            table = table.append_column(schema.field(name), nulls)
        return table.select(wanted)


def read_header(path: Path) -> tuple[int, str, dict[str, Any]]:
    """Row count, SHA-256 of the unit's latents file ("" without one) and note of a Parquet shard."""
    with _damage(path):
        metadata = pq.read_metadata(path)
    pairs = metadata.metadata or {}
    return metadata.num_rows, pairs.get(_LATENTS_HASH, b"").decode(), json.loads(pairs.get(_NOTE, b"{}"))


@contextmanager
def _damage(path: Path, missing: str = "is missing") -> Iterator[None]:
    """Turns what a reader raises on a file that is gone or damaged into one clear error."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{path} {missing}; {_advice(path)}") from error
    except (pa.ArrowException, SafetensorError, OSError) as error:
        raise StoreError(f"{path} is truncated or damaged ({error}); {_advice(path)}") from error


def _advice(path: Path) -> str:
    shard = Shard.parse(path.name)
    if shard is None:
        return "restore it from a copy"
    if shard.stage == "label":
        return "restore it from a copy: it holds people's answers"
    return (
        f"restore it from a copy, or delete it, {shard.sibling(STAGE_KINDS[shard.stage][-1]).name} and "
        f"manifests/{shard.stage}-{shard.iteration:04d}.json (and what was made from them later) and resume: "
        "the unit is made again"
    )
