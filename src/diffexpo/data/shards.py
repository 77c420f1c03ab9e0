"""Shards: the files the store is made of, their names, how one is written and read, and where a sample is.

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
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffexpo.data.rows import LATER_COLUMNS, SCHEMAS
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
_OPEN_FILES = 256


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

    def sibling(self, kind: str) -> Shard:
        """The shard of another kind of the same unit."""
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
        iteration, rank, unit = (int(match[name]) for name in ("iteration", "rank", "unit"))
        return Shard(match["kind"], match["stage"] or _HOME[match["kind"]], iteration, rank, unit)


def list_shards(
    root: Path, kind: str | None = None, stage: str | None = None, iteration: int | None = None
) -> list[Shard]:
    """Shards that are on the disk, whole or not yet complete as a unit, in reading order."""
    found = [shard for entry in os.scandir(root) if (shard := Shard.parse(entry.name))]
    found = [shard for shard in found if kind in (None, shard.kind) and stage in (None, shard.stage)]
    found = [shard for shard in found if iteration in (None, shard.iteration)]
    # by iteration, stage and unit, whatever the number of processes
    return sorted(found, key=lambda shard: (shard.iteration, shard.stage, shard.unit, shard.rank, shard.kind))


def check_latents(ids: Sequence[str], latents: Sequence[np.ndarray] | ArrayLike) -> dict[str, np.ndarray]:
    """The latents by sample id; a StoreError unless there is one float array (C,h,w) for each id."""
    arrays = latents if isinstance(latents, list) else list(np.asarray(latents))
    if len(arrays) != len(ids):
        raise StoreError(
            f"{len(ids)} samples came with {len(arrays)} latents; there must be an array for each"
        )
    for sample_id, array in zip(ids, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f":
            raise StoreError(
                f"latents of {sample_id!r} are {array!r:.80}; they must be a float array (C,h,w)"
            )
    return dict(zip(ids, arrays, strict=True))


def write_latents(path: Path, latents: Mapping[str, np.ndarray]) -> str:
    """Write arrays by sample id, bit for bit; returns the file's SHA-256."""
    # safetensors copies raw memory: an array that is a view would be written in the wrong order
    data = save(
        {key: np.ascontiguousarray(array) for key, array in latents.items()}, {"format": "diffexpo-latents-1"}
    )
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


class LatentFile:
    """A memory-mapped latents shard; `names` are its sample ids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _damage(path, "is missing although its samples are in the store"):
            file: Any = safe_open(str(path), framework="numpy")
        self._file = file
        self.names = frozenset(file.keys())

    def read(self, sample_id: str) -> np.ndarray:
        """A copy of one sample's latents (C,h,w)."""
        if sample_id not in self.names:
            raise StoreError(
                f"{self.path} does not hold the latents of sample {sample_id!r}; {_advice(self.path)}"
            )
        return self._file.get_tensor(sample_id)


def write_rows(
    path: Path, table: pa.Table, *, latents_sha256: str = "", note: Mapping[str, object] | None = None
) -> None:
    """Write one Parquet shard; `note` is any small JSON that belongs to the unit."""
    metadata = {_NOTE: json.dumps(dict(note or {}), sort_keys=True), _LATENTS_HASH: latents_sha256}
    buffer = io.BytesIO()
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
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


class Places:
    """An index of sample ids over all shards of a folder, complete or not; it grows with the folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._places: dict[str, tuple[str, int]] = {}  # sample id -> (samples shard, row)
        self._indexed: set[str] = set()
        self._open = lru_cache(maxsize=_OPEN_FILES)(LatentFile)

    def add(self, name: str, ids: Sequence[str]) -> None:
        """Enter the ids of a samples shard in the order of its rows."""
        for position, sample_id in enumerate(ids):
            if sample_id in self._places:
                raise StoreError(
                    f"sample {sample_id!r} is in both {self._places[sample_id][0]} and {name}; delete one "
                    "and resume"
                )
            self._places[sample_id] = (name, position)
        self._indexed.add(name)

    def refuse_stored(self, ids: Sequence[str]) -> None:
        """Raise a StoreError if one of the ids is in the store, whichever process wrote it."""
        self._refresh()
        for name in ids:
            if name in self._places:
                raise StoreError(
                    f"sample {name!r} is in the store already ({self._places[name][0]}); ids are unique"
                )

    def find(self, sample_id: str) -> tuple[str, int] | None:
        """(samples shard, row) of a sample; None if there is no such sample."""
        if sample_id not in self._places:
            self._refresh()
        return self._places.get(sample_id)

    def require(self, sample_id: str) -> tuple[str, int]:
        """`find`, of a sample that must be there."""
        place = self.find(sample_id)
        if place is None:
            raise StoreError(f"there is no sample {sample_id!r} in {self._root}; `samples()` lists them")
        return place

    def latent_file(self, sample_id: str) -> LatentFile:
        """The open file that holds a sample's latents."""
        shard = Shard.named(self.require(sample_id)[0])
        return self._open(self._root / shard.sibling("latents").name)

    def clear(self) -> None:
        """Forget everything, after files were removed."""
        self._places.clear()
        self._indexed.clear()
        self._open.cache_clear()

    def _refresh(self) -> None:
        """Index the shards that other processes wrote meanwhile."""
        for shard in list_shards(self._root, "samples"):
            if shard.name not in self._indexed:
                table = read_rows(self._root / shard.name, SCHEMAS["samples"], ["sample_id"])
                self.add(shard.name, table["sample_id"].to_pylist())
