"""Where each sample of a store is: the shard and row of its id, and the open file of its latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from diffexpo.data.rows import SCHEMAS
from diffexpo.data.shards import LatentFile, Shard, list_shards, read_rows
from diffexpo.errors import StoreError

_OPEN_FILES = 256


class Places:
    """An index of sample ids over all shards of a folder, complete or not; it grows with the folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._places: dict[str, tuple[str, int]] = {}  # sample id -> (samples shard, row)
        self._indexed: set[str] = set()
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._latents_of)

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
        for sample_id in ids:
            if sample_id in self._places:
                raise StoreError(
                    f"sample {sample_id!r} is in the store already ({self._places[sample_id][0]}); ids are "
                    "unique"
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
        return self._open(self.require(sample_id)[0])

    def clear(self) -> None:
        """Forget everything, after files were removed."""
        self._places.clear()
        self._indexed.clear()
        self._open.cache_clear()

    def _latents_of(self, name: str) -> LatentFile:
        return LatentFile(self._root / Shard.named(name).sibling("latents").name)

    def _refresh(self) -> None:
        """Index the shards that other processes wrote meanwhile."""
        for shard in list_shards(self._root, "samples"):
            if shard.name not in self._indexed:
                table = read_rows(self._root / shard.name, SCHEMAS["samples"], ["sample_id"])
                self.add(shard.name, table["sample_id"].to_pylist())
