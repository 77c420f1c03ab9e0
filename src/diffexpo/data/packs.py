"""Packs: the units of a complete stage as a few large files, so that no folder grows with the units.

    units -> packs -> manifest that names the packs -> units removed

Every step is durable before the next begins. Killed before the manifest, the units are still there and the
packs are made again; killed after it, the units are garbage that `remove_units` finds. The rows of a pack
are those of its units in order, so what is read does not change, nor does it depend on the processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from diffexpo.data.latent_files import Kind, LatentPack, UnitBytes, digests_of, write_pack
from diffexpo.data.manifests import manifest_files
from diffexpo.data.rows import SCHEMAS
from diffexpo.data.shards import (
    ROWS_AT_ONCE,
    STAGE_KINDS,
    Shard,
    damaged,
    list_shards,
    read_header,
    read_rows,
    write_tables,
)
from diffexpo.errors import StoreError
from diffexpo.files import sha256_of

PACKED = ("collect", "improve", "offline")
"""Stages whose units become packs; a label is small, may come at any time and stays what it is."""

_PACK_BYTES = 1 << 30
_PACK_ROWS = 1 << 16


def pack_units(root: Path, units: Sequence[Shard]) -> dict[str, dict[str, object]]:
    """Write the packs of a stage's units, which are all there; returns the manifest's entries.

    Raises:
        StoreError: a latents file is not the one that was written with its rows, or two units hold a sample.
    """
    files: dict[str, dict[str, object]] = {}
    samples = [shard for shard in units if shard.kind == "samples"]
    for number, pack in enumerate(_packs(root, samples)):
        files |= pack.write(root, number)
    _refuse_doubles(root, files, samples)
    pairs = [shard for shard in units if shard.kind == "pairs"]
    if pairs:
        shard = Shard("pairs", pairs[0].stage, pairs[0].iteration, None, 0)
        tables = (read_rows(root / one.name, SCHEMAS["pairs"]) for one in pairs)
        count = write_tables(root / shard.name, _combined(tables), SCHEMAS["pairs"], "")
        files[shard.name] = _entry(root / shard.name, count)
    return files


def remove_units(root: Path, stage: str, iteration: int) -> None:
    """Remove the units of a stage whose manifest names packs; they are all in them."""
    if is_packed(manifest_files(root, stage, iteration)):
        kinds = {kind: rank for rank, kind in enumerate(reversed(STAGE_KINDS[stage]))}
        # what marks a unit as done goes first
        for shard in sorted(list_shards(root, None, stage, iteration), key=lambda one: kinds[one.kind]):
            (root / shard.name).unlink(missing_ok=True)


def remove_leftovers(root: Path) -> None:
    """`remove_units` of every stage that a killed process packed and did not clean up."""
    for stage, iteration in {(shard.stage, shard.iteration) for shard in list_shards(root)}:
        if stage in PACKED:
            remove_units(root, stage, iteration)


def is_packed(files: dict[str, dict[str, object]]) -> bool:
    """Whether a manifest's files are packs."""
    return any((shard := Shard.parse(name)) is not None and shard.is_pack for name in files)


@dataclass
class _Pack:
    """The units that become one pack, and what is known of each row."""

    units: list[Shard] = field(default_factory=list)
    ids: list[list[str]] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    size: int = 0

    def takes(self, size: int, rows: int) -> bool:
        """Whether a unit still fits; the first one always does."""
        is_full = self.size + size > _PACK_BYTES or len(self.kinds) + rows > _PACK_ROWS
        return not self.units or not is_full

    def write(self, root: Path, number: int) -> dict[str, dict[str, object]]:
        """Latents first: rows mark a pack as whole, as they do a unit."""
        first = self.units[0]
        rows = Shard("samples", first.stage, first.iteration, None, number)
        latents = rows.sibling("latents")
        ids = [name for names in self.ids for name in names]
        digest = write_pack(root / latents.name, ids, self.kinds, lambda: self._latents(root))
        column = SCHEMAS["samples"].get_field_index("latent_file")

        def renamed() -> Iterator[pa.Table]:
            for table in _combined(read_rows(root / one.name, SCHEMAS["samples"]) for one in self.units):
                names = pa.array([latents.name] * table.num_rows, pa.string())
                yield table.set_column(column, SCHEMAS["samples"].field(column), names)

        count = write_tables(root / rows.name, renamed(), SCHEMAS["samples"], digest)
        entry = {"sha256": digest, "rows": count, "bytes": (root / latents.name).stat().st_size}
        return {latents.name: entry, rows.name: _entry(root / rows.name, count)}

    def _latents(self, root: Path) -> Iterator[tuple[int, memoryview]]:
        row = 0
        for shard, names in zip(self.units, self.ids, strict=True):
            unit = UnitBytes.read(root / shard.sibling("latents").name)
            for name in names:
                yield row, unit.bytes_of(name)
                row += 1


def _packs(root: Path, units: Sequence[Shard]) -> Iterator[_Pack]:
    pack = _Pack()
    for shard in units:
        path = root / shard.sibling("latents").name
        ids = read_rows(root / shard.name, SCHEMAS["samples"], ["sample_id"])["sample_id"].to_pylist()
        unit = UnitBytes.read(path)
        if unit.sha256 != read_header(root / shard.name)[1] or set(ids) != set(unit.kinds):
            raise StoreError(f"{path} is not the file that was written with its rows; delete both and resume")
        size = path.stat().st_size
        if not pack.takes(size, len(ids)):
            yield pack
            pack = _Pack()
        pack.units.append(shard)
        pack.ids.append(ids)
        pack.kinds += [unit.kinds[name] for name in ids]
        pack.size += size
    if pack.units:
        yield pack


def _combined(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables as tables of about a row group each."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        if count >= ROWS_AT_ONCE:
            yield pa.concat_tables(waiting)
            waiting, count = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _refuse_doubles(root: Path, files: dict[str, dict[str, object]], units: Sequence[Shard]) -> None:
    """A StoreError where two units hold one sample, which different processes can have written."""
    packs = [LatentPack(root / name) for name in files if name.startswith("latents-")]
    digests = np.sort(np.concatenate([pack.digest for pack in packs])) if packs else np.empty(0, "<u8")
    double = digests[1:][digests[1:] == digests[:-1]]
    if not len(double):
        return
    found: dict[str, str] = {}
    for shard in units:
        ids = read_rows(root / shard.name, SCHEMAS["samples"], ["sample_id"])["sample_id"].to_pylist()
        for name in np.array(ids)[np.isin(digests_of(ids), double)]:
            if name in found:
                raise StoreError(
                    f"sample {str(name)!r} is in both {found[name]} and {shard.name}; delete one and resume"
                )
            found[name] = shard.name
    raise damaged(packs[0].path, f"holds samples of one digest, {', '.join(found)}: give them other ids")


def _entry(path: Path, rows: int) -> dict[str, object]:
    return {"sha256": sha256_of(path), "rows": rows, "bytes": path.stat().st_size}
