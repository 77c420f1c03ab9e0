"""Where each sample of a store lies: the shard and row of its id, and the open file of its latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffexpo.data.rows import SCHEMAS
from diffexpo.data.shards import LatentFile, Shard, list_shards, read_rows
from diffexpo.errors import StoreError

_OPEN_FILES = 256


class Places:
    """An index of sample ids over all shards, complete stages or not; it grows with the folder.

    Args:
        root: The store's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._places: dict[str, tuple[str, int]] = {}  # sample id -> (samples shard, row)
        self._indexed: set[str] = set()
        self._latent_files: dict[str, LatentFile] = {}

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
        """(samples shard, row) of a sample.

        Raises:
            StoreError: there is no such sample.
        """
        place = self.find(sample_id)
        if place is None:
            raise StoreError(f"there is no sample {sample_id!r} in {self._root}; `samples()` lists them")
        return place

    def latent_file(self, sample_id: str) -> LatentFile:
        """The open file that holds a sample's latents."""
        name = self.require(sample_id)[0]
        if name not in self._latent_files:
            if len(self._latent_files) >= _OPEN_FILES:
                self._latent_files.pop(next(iter(self._latent_files)))
            self._latent_files[name] = LatentFile(self._root / Shard.named(name).sibling("latents").name)
        return self._latent_files[name]

    def clear(self) -> None:
        """Forget everything, after files were removed."""
        self._places.clear()
        self._indexed.clear()
        self._latent_files.clear()

    def _refresh(self) -> None:
        """Index the shards that other processes wrote meanwhile."""
        for shard in list_shards(self._root, "samples"):
            if shard.name not in self._indexed:
                table = read_rows(self._root / shard.name, SCHEMAS["samples"], ["sample_id"])
                self.add(shard.name, table["sample_id"].to_pylist())
