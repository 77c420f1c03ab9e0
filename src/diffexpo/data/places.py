"""Where a sample is: (file, row) by its id, over units and packs, and the files that are open.

Units of stages that are not complete are few and are kept by name. The samples of packs are found by the
sorted digests of their ids, 16 bytes a sample, in a time that hardly grows with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from diffexpo.data.latent_files import LatentFile, LatentPack, digests_of
from diffexpo.data.manifests import list_manifests, manifest_files
from diffexpo.data.packs import is_packed
from diffexpo.data.rows import SCHEMAS, Sample, to_rows
from diffexpo.data.shards import Shard, count_groups, in_order, list_shards, read_rows
from diffexpo.errors import StoreError

_OPEN_FILES = 256
_OPEN_GROUPS = 16

Place = tuple[str, int]
"""Name of a samples shard, and a row of it."""


class Places:
    """An index of sample ids over a store, of complete stages or not; it grows with the store."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open = lru_cache(maxsize=_OPEN_FILES)(LatentFile)
        self._groups = lru_cache(maxsize=_OPEN_GROUPS)(self._read_group)
        self._ends = lru_cache(maxsize=None)(self._read_ends)
        self.clear()

    def clear(self) -> None:
        """Forget everything, after files were removed."""
        self._is_read = False
        self._units: dict[str, Place] = {}  # sample id -> place
        self._indexed: set[str] = set()
        self._known: dict[tuple[str, int], bool] = {}  # complete stage -> whether it has packs
        self._packs: dict[str, LatentPack] = {}  # by the name of their rows
        self._digests, self._rows = np.empty(0, "<u8"), np.empty(0, np.int64)
        for cache in (self._open, self._groups, self._ends):
            cache.cache_clear()

    def add(self, name: str, ids: Sequence[str]) -> None:
        """Enter the ids of a unit in the order of its rows."""
        for position, sample_id in enumerate(ids):
            if sample_id in self._units:
                raise StoreError(
                    f"sample {sample_id!r} is in both {self._units[sample_id][0]} and {name}; delete one "
                    "and resume"
                )
            self._units[sample_id] = (name, position)
        self._indexed.add(name)

    def refuse_stored(self, ids: Sequence[str]) -> None:
        """Raise a StoreError if one of the ids is known to be in the store. What another process writes at
        the same time is compared when the stage is complete."""
        if not self._is_read:
            self._refresh()
        for name, place in zip(ids, self._find(ids), strict=True):
            if place is not None:
                raise StoreError(f"sample {name!r} is in the store already ({place[0]}); ids are unique")

    def find(self, ids: Sequence[str]) -> list[Place | None]:
        """The place of each sample; None if there is no such sample."""
        found = self._find(ids) if self._is_read else []
        if not found or None in found:
            self._refresh()
            found = self._find(ids)
        return found

    def require(self, ids: Sequence[str]) -> list[Place]:
        """`find`, of samples that must be there."""
        found = self.find(ids)
        if any(self._is_gone(name) for name in {place[0] for place in found if place is not None}):
            self.clear()  # another process has packed the units meanwhile
            found = self.find(ids)
        places = [place for place in found if place is not None]
        if len(places) < len(found):
            missing = ids[found.index(None)]
            raise StoreError(f"there is no sample {missing!r} in {self._root}; `samples()` lists them")
        return places

    def latents(self, ids: Sequence[str]) -> list[np.ndarray]:
        """Each sample's latents (C,h,w), read-only where they are views of a pack."""
        places, packs = self.require(ids), self._packs
        return [
            packs[name].view(row) if name in packs else self._unit_latents(name).read(sample_id)
            for sample_id, (name, row) in zip(ids, places, strict=True)
        ]

    def samples(self, ids: Sequence[str]) -> list[Sample]:
        """The rows of samples; those of one row group cost one reading."""
        wanted: dict[tuple[str, int], list[tuple[int, int]]] = {}
        for i, (name, row) in enumerate(self.require(ids)):
            ends = self._ends(name)
            group = int(np.searchsorted(ends, row, side="right"))
            first = int(ends[group - 1]) if group else 0
            wanted.setdefault((name, group), []).append((i, row - first))
        found: dict[int, Sample] = {}
        for (name, group), places in wanted.items():
            rows = self._groups(name, group).take([row for _, row in places])
            found |= zip((i for i, _ in places), to_rows(rows, Sample), strict=True)
        return [found[i] for i in range(len(ids))]

    # ---- inside --------------------------------------------------------------------------------------------

    def _find(self, ids: Sequence[str]) -> list[Place | None]:
        places = [self._units.get(name) for name in ids]
        missing = [i for i, place in enumerate(places) if place is None]
        if not missing or not len(self._digests):
            return places
        wanted = digests_of([ids[i] for i in missing])
        at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
        names = list(self._packs)
        for i, is_there, code in zip(missing, self._digests[at] == wanted, self._rows[at], strict=True):
            if is_there:
                places[i] = (names[int(code) >> 32], int(code) & 0xFFFFFFFF)
        return places

    def _refresh(self) -> None:
        """Index what this and other processes wrote meanwhile."""
        self._is_read = True
        new = [stage for stage in list_manifests(self._root) if stage not in self._known]
        for stage in new:
            files = manifest_files(self._root, *stage)
            self._known[stage] = is_packed(files)
            names = [name for name in files if name.startswith("samples-")]
            if self._known[stage]:
                self._forget_units(stage)
                self._add_packs(in_order(Shard.named(name) for name in names))
        for shard in list_shards(self._root, "samples"):
            is_left_over = self._known.get((shard.stage, shard.iteration), False)
            if shard.name not in self._indexed and not is_left_over:
                table = read_rows(self._root / shard.name, SCHEMAS["samples"], ["sample_id"])
                self.add(shard.name, table["sample_id"].to_pylist())

    def _forget_units(self, stage: tuple[str, int]) -> None:
        """Leave out the units of a stage that has been packed."""
        shards = map(Shard.named, self._indexed)
        names = {shard.name for shard in shards if (shard.stage, shard.iteration) == stage}
        if names:
            self._units = {key: place for key, place in self._units.items() if place[0] not in names}
            self._indexed -= names

    def _add_packs(self, shards: Sequence[Shard]) -> None:
        digests, rows = [self._digests], [self._rows]
        for shard in shards:
            pack = LatentPack(self._root / shard.sibling("latents").name)
            rows.append(pack.row + (len(self._packs) << 32))
            digests.append(pack.digest)
            self._packs[shard.name] = pack
        every, codes = np.concatenate(digests), np.concatenate(rows)
        order = np.argsort(every, kind="stable")
        self._digests, self._rows = every[order], codes[order]
        double = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        if len(double):
            both = [list(self._packs)[int(self._rows[double[0] + k]) >> 32] for k in (0, 1)]
            raise StoreError(f"a sample is in both {both[0]} and {both[1]} of {self._root}; ids are unique")

    def _is_gone(self, name: str) -> bool:
        """Whether a unit's latents have been removed since they were found, and not been opened before."""
        shard = Shard.named(name)
        if shard.is_pack or (self._root / shard.name).exists():
            return False
        return is_packed(manifest_files(self._root, shard.stage, shard.iteration))

    def _unit_latents(self, name: str) -> LatentFile:
        return self._open(self._root / Shard.named(name).sibling("latents").name)

    def _read_group(self, name: str, group: int) -> pa.Table:
        return read_rows(self._root / name, SCHEMAS["samples"], group=group)

    def _read_ends(self, name: str) -> np.ndarray:
        return np.cumsum(count_groups(self._root / name))
