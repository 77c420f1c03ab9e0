"""The store: everything a run drew, scored, was given and paired, in one append-only folder of plain files.

    store/samples-*.parquet  latents-*.safetensors  pairs-*.parquet      shards
    store/manifests/<stage>-<iteration>.json                             written last: complete

A shard never changes once it has its name. Each process writes shards of its own units of work; after a
barrier (the caller's) one process makes packs of them (`packs`) and writes the manifest with every file's
SHA-256 and row count. `samples()` and `pairs()` see what a manifest names; what no manifest names is a unit
to continue from or garbage, and `discard_incomplete` tells which. Nothing that is done for each unit or each
batch lists a folder, so its cost does not grow with the store. Loads without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from diffexpo.data.audit import Check, Lineage, describe_file, find_problems, refuse, trace
from diffexpo.data.latent_files import check_latents, write_latents
from diffexpo.data.listing import named_shards, shards_of_stage, written_units
from diffexpo.data.manifests import (
    list_manifests,
    manifest_files,
    manifest_path,
    read_manifest,
    write_manifest,
)
from diffexpo.data.packs import PACKED, pack_units, remove_leftovers, remove_units
from diffexpo.data.places import Places
from diffexpo.data.rows import SCHEMAS, ImageSize, Pair, Row, Sample, column_names, to_rows, to_table
from diffexpo.data.shards import (
    STAGE_KINDS,
    Shard,
    count_groups,
    list_shards,
    read_header,
    read_rows,
    write_rows,
)
from diffexpo.errors import MissingError, StoreError
from diffexpo.files import TEMPORARY

_RESUMABLE = ("collect", "improve", "offline", "label")


class Store:
    """A folder of samples, latents and pairs.

    Args:
        root: The folder, e.g. `runs/expo/store`.
        create: Make it when it is not there; else a MissingError is raised. A folder that holds other things
            is refused with a StoreError and left as it is.
    """

    def __init__(self, root: str | Path, *, create: bool = True) -> None:
        self.root = Path(root)
        if self.root.is_dir():
            _refuse_other_folder(self.root)
        if create:
            (self.root / "manifests").mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)
        elif not self.root.is_dir():
            raise MissingError(
                f"there is no store at {self.root}; name a run folder that has collected or imported data"
            )
        self._places = Places(self.root)
        self._check: Check | None = None
        self._units: dict[tuple[str, str, int], set[int]] = {}  # units by kind, stage and iteration

    # ---- writing -------------------------------------------------------------------------------------------

    def append_unit(
        self,
        iteration: int,
        rank: int,
        unit: int,
        samples: Sequence[Sample],
        latents: Sequence[np.ndarray] | ArrayLike,
        *,
        stage: str = "collect",
    ) -> str:
        """Write one finished unit: its latents, then its rows, whose file marks the unit as done.

        Args:
            iteration, rank, unit: Name the shard. A unit is written once, by whichever process.
            samples: Rows; iteration, unit and latent_file are filled in.
            latents: One float array (C,h,w) for each sample, in a list or stacked; stored bit for bit.
            stage: `collect`, `improve` or `offline`.
        Returns:
            Name of the Parquet shard.
        """
        shard = Shard("samples", stage, iteration, rank, unit)
        self._refuse_rewrite(shard)
        latent_shard = shard.sibling("latents")
        filled = {"iteration": iteration, "unit": unit, "latent_file": latent_shard.name}
        table = to_table(samples, "samples", filled)
        ids = table["sample_id"].to_pylist()
        arrays = check_latents(ids, latents)
        self._places.refuse_stored(ids)
        digest = write_latents(self.root / latent_shard.name, arrays)
        write_rows(self.root / shard.name, table, latents_sha256=digest)
        self._places.add(shard.name, ids)
        self._mark(shard)
        return shard.name

    def append_pairs(
        self,
        iteration: int,
        rank: int,
        pairs: Sequence[Pair],
        *,
        unit: int = 0,
        stage: str = "pair",
        note: Mapping[str, object] | None = None,
    ) -> str:
        """Write one shard of preferences between samples that are in the store.

        Args:
            iteration, rank, unit: Name the shard.
            pairs: Rows; iteration is filled in.
            stage: `pair` (ranked by rewards), `offline` (imported) or `label` (people).
            note: Small JSON kept with the unit, see `notes()`.
        Returns:
            Name of the Parquet shard.
        """
        shard = Shard("pairs", stage, iteration, rank, unit)
        self._refuse_rewrite(shard)
        table = to_table(pairs, "pairs", {"iteration": iteration})
        self._check_pairs(pairs)
        write_rows(self.root / shard.name, table, note=note)
        self._mark(shard)
        return shard.name

    def write_manifest(self, stage: str, iteration: int, payload: Mapping[str, object]) -> Path:
        """Declare a stage of an iteration complete, also one that writes no shards (train, evaluate), and
        make packs of its units. One process calls this, after all have written their shards.

        Args:
            payload: JSON kept with it; numbers that are not finite become null.
        Raises:
            StoreError: a unit is missing or half written, a latents file is not the one that was written
                with its rows, two units hold a sample, an older manifest names a file that is gone, or what
                `check` began has found damage.
        """
        if self._check is not None:
            self._check.wait()
        shards = list_shards(self.root, stage=stage, iteration=iteration)
        self._check_units(stage, iteration, shards)
        if stage not in PACKED:
            files = {shard.name: describe_file(self.root, shard) for shard in shards}
            return write_manifest(self.root, stage, iteration, payload, files)
        path = write_manifest(self.root, stage, iteration, payload, pack_units(self.root, shards))
        remove_units(self.root, stage, iteration)
        self._forget()
        return path

    def discard_incomplete(self, stage: str, iteration: int) -> list[str]:
        """Remove what a killed process left of a stage; call it on one process before the stage starts again.

        Finished units of collect, offline and label stay (the stage continues after them); an unfinished
        `pair` stage, which takes moments, is removed whole. Files that a manifest names are never touched.
        Returns the names of the files removed.
        """
        kept = set(manifest_files(self.root, stage, iteration))
        if stage in _RESUMABLE:
            done, shards = STAGE_KINDS[stage][-1], list_shards(self.root, stage=stage, iteration=iteration)
            kept |= {one.name for one in shards if (self.root / one.sibling(done).name).exists()}
        removed, manifest = [], manifest_path(self.root, stage, iteration).name
        for path in sorted([*self.root.iterdir(), *(self.root / "manifests").glob(f"*{TEMPORARY}")]):
            name = path.name.removesuffix(TEMPORARY)
            found = Shard.parse(name)
            is_own = (found.stage, found.iteration) == (stage, iteration) if found else name == manifest
            if is_own and path.name not in kept:
                path.unlink()
                removed.append(path.name)
        self._forget()
        return removed

    # ---- state ---------------------------------------------------------------------------------------------

    def is_complete(self, stage: str, iteration: int) -> bool:
        """Whether the stage's manifest is there (and readable: a damaged one is a StoreError, not a no)."""
        return read_manifest(self.root, stage, iteration) is not None

    def unit_done(self, iteration: int, unit: int, *, stage: str = "collect") -> bool:
        """Whether a unit's shards are written: by this process, or by any before the first question."""
        return unit in self._written(STAGE_KINDS[stage][-1], stage, iteration)

    def manifest(self, stage: str, iteration: int) -> dict[str, Any]:
        """The payload a stage was completed with; a StoreError where it is not complete."""
        found = read_manifest(self.root, stage, iteration)
        if found is None:
            path = manifest_path(self.root, stage, iteration)
            raise StoreError(
                f"there is no {path}: {stage} {iteration} is not complete; resume the run to finish it"
            )
        return found[0]

    def completed(self) -> list[tuple[str, int]]:
        """(stage, iteration) of every manifest, by iteration."""
        return list_manifests(self.root)

    def notes(self, iteration: int, *, stage: str) -> dict[int, dict[str, Any]]:
        """The note that each unit's pairs were written with, of a stage that is not complete."""
        shards = list_shards(self.root, "pairs", stage, iteration)
        return {shard.unit: read_header(self.root / shard.name)[2] for shard in shards}

    # ---- reading -------------------------------------------------------------------------------------------

    @overload
    def samples(self, iteration: int | None = None) -> list[Sample]: ...
    @overload
    def samples(self, iteration: int | None = None, *, view: type[Row]) -> list[Row]: ...
    def samples(self, iteration: int | None = None, *, view: type[Any] = Sample) -> list[Any]:
        """Samples of complete stages, of one iteration or of all, by iteration and unit.

        `view` says what to read of each sample: a dataclass of some of its fields; only those columns are
        read. An iteration that has shards but no manifest is a StoreError.
        """
        return self._rows("samples", named_shards(self.root, "samples", iteration), view)

    @overload
    def pairs(self, iteration: int | None = None, source: str | None = None) -> list[Pair]: ...
    @overload
    def pairs(
        self, iteration: int | None = None, source: str | None = None, *, view: type[Row]
    ) -> list[Row]: ...
    def pairs(
        self, iteration: int | None = None, source: str | None = None, *, view: type[Any] = Pair
    ) -> list[Any]:
        """Pairs, as `samples`; optionally of one source (offline, online, human)."""
        return self._rows("pairs", named_shards(self.root, "pairs", iteration), view, source)

    def collected(self, iteration: int, *, stage: str = "collect") -> list[Sample]:
        """Samples of every finished unit, whether the stage is complete or not."""
        return self._rows("samples", shards_of_stage(self.root, "samples", stage, iteration), Sample)

    def parts(self, kind: str, view: type[Row], source: str | None = None) -> Iterator[list[Row]]:
        """All "samples" or "pairs" of complete stages in order, as `pairs`, but some thousands at a time."""
        for shard in named_shards(self.root, kind):
            for group in range(len(count_groups(self.root / shard.name))):
                yield self._rows(kind, [shard], view, source, group)

    def table(
        self,
        kind: str,
        columns: Sequence[str],
        since: int = 0,
        before: int | None = None,
        *,
        encoded: Sequence[str] = (),
    ) -> pa.Table:
        """Columns of the "samples" or "pairs" of complete stages, of iterations [since, before) or of all;
        those that are `encoded` as codes of a dictionary."""
        schema, end = SCHEMAS[kind], math.inf if before is None else before
        shards = [one for one in named_shards(self.root, kind) if since <= one.iteration < end]
        tables = [read_rows(self.root / one.name, schema, columns, encoded=encoded) for one in shards]
        table = pa.concat_tables(tables) if tables else schema.empty_table().select(columns)
        return table.unify_dictionaries()

    def sample(self, sample_id: str) -> Sample:
        """One sample; a StoreError if it is not in the store."""
        return self.samples_of([sample_id])[0]

    def samples_of(self, sample_ids: Sequence[str]) -> list[Sample]:
        """Samples in the order asked for; those that were stored one after another cost one reading."""
        return self._places.samples(sample_ids)

    def latent(self, sample_id: str) -> np.ndarray:
        """A copy of one sample's latents (C,h,w), bit for bit as they were stored."""
        return np.array(self._places.latents([sample_id])[0])

    def latents(self, sample_ids: Sequence[str]) -> np.ndarray:
        """Latents (N,C,h,w) in the order asked for (repeats allowed), from memory-mapped files; a StoreError
        where they differ in shape or type, or there are none."""
        stretches = self.stretches(sample_ids)
        if len(stretches) > 1:
            other = stretches[1][0]
            raise StoreError(
                f"latents of {sample_ids[len(stretches[0])]!r} are {other.dtype} {other.shape}, those of "
                f"{sample_ids[0]!r} are {stretches[0].dtype} {stretches[0].shape[1:]}; samples of one size "
                "are expected here (without model.buckets a store belongs to one model: import or collect "
                "into a new run)"
            )
        return stretches[0]

    def stretches(self, sample_ids: Sequence[str]) -> list[np.ndarray]:
        """Latents in the order asked for, as consecutive arrays (N,C,h,w) of one shape each; a StoreError
        where they differ in type, or there are none."""
        arrays = self._places.latents(sample_ids)
        if not arrays:
            raise StoreError("no sample ids were given, so there are no latents to stack")
        first = arrays[0]
        for sample_id, array in zip(sample_ids, arrays, strict=True):
            if array.ndim != first.ndim or array.shape[0] != first.shape[0] or array.dtype != first.dtype:
                raise StoreError(
                    f"latents of {sample_id!r} are {array.dtype} {array.shape}, those of {sample_ids[0]!r} "
                    f"are {first.dtype} {first.shape}; a store belongs to one model: import or collect into "
                    "a new run"
                )
        return [np.stack(list(part)) for _, part in groupby(arrays, key=lambda array: array.shape)]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of each sample's image, by sample id; of samples that have one in their row."""
        rows = self.samples(view=ImageSize)
        return {row.sample_id: (row.height, row.width) for row in rows if row.height and row.width}

    def lineage(self, pair_id: str) -> Lineage:
        """A pair's whole history; a StoreError if it is not in the store."""
        return trace(self.root, pair_id, self.sample)

    def verify(self) -> int:
        """Recompute every SHA-256 and row count; returns the number of files. A StoreError lists problems."""
        refuse(self.root, find_problems(self.root))
        return sum(len(manifest_files(self.root, stage, iteration)) for stage, iteration in self.completed())

    def check(self) -> None:
        """Verify what complete stages name: now, or where it is much while other work goes on. A StoreError
        lists problems, here or when the next stage is to be complete: nothing is built on damaged data."""
        self._check = Check(self.root)

    # ---- inside --------------------------------------------------------------------------------------------

    def _written(self, kind: str, stage: str, iteration: int) -> set[int]:
        """Units of a kind that are written; the folder is listed for the first question alone."""
        key = (kind, stage, iteration)
        if key not in self._units:
            self._units[key] = written_units(self.root, *key)
        return self._units[key]

    def _mark(self, shard: Shard) -> None:
        self._written(shard.kind, shard.stage, shard.iteration).add(shard.unit)

    def _forget(self) -> None:
        """After files were removed."""
        self._places.clear()
        self._units.clear()

    def _rows(
        self,
        kind: str,
        shards: Sequence[Shard],
        view: type[Row],
        source: str | None = None,
        group: int | None = None,
    ) -> list[Row]:
        """The rows of shards, or of a row group of each, as a view, of one source or of all."""
        schema, columns = SCHEMAS[kind], column_names(view)
        unknown = [name for name in columns if name not in schema.names]
        if unknown:
            raise StoreError(
                f"there is no column {unknown[0]!r} among the {kind}; there are {', '.join(schema.names)}"
            )
        read = columns if source is None else list(dict.fromkeys([*columns, "source"]))
        tables = [read_rows(self.root / one.name, schema, read, group=group) for one in shards]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        if source is not None:
            table = table.filter(pc.equal(table["source"], source))
        return to_rows(table.select(columns), view)

    def _refuse_rewrite(self, shard: Shard) -> None:
        if shard.stage not in STAGE_KINDS or shard.kind not in STAGE_KINDS[shard.stage]:
            raise StoreError(
                f"stage {shard.stage!r} writes no {shard.kind}; the stages are {', '.join(STAGE_KINDS)}"
            )
        if shard.stage != "label" and manifest_path(self.root, shard.stage, shard.iteration).exists():
            raise StoreError(
                f"{shard.stage} {shard.iteration} is complete; the store only grows by new iterations"
            )
        if shard.unit in self._written(shard.kind, shard.stage, shard.iteration):
            raise StoreError(
                f"unit {shard.unit} of {shard.stage} {shard.iteration} is in the store already; ask "
                "unit_done() and skip it, or call discard_incomplete() when the stage starts"
            )

    def _check_pairs(self, pairs: Sequence[Pair]) -> None:
        named = [
            (pair, column, str(sample_id))
            for pair in pairs
            for column in ("winner_id", "loser_id", "explored_id", "main_id")
            if (sample_id := getattr(pair, column)) is not None
        ]
        for pair in pairs:
            if pair.winner_id == pair.loser_id:
                raise StoreError(f"pair {pair.pair_id!r}: sample {pair.winner_id!r} is both winner and loser")
        places = self._places.find([sample_id for *_, sample_id in named])
        for (pair, column, sample_id), place in zip(named, places, strict=True):
            if place is None:
                raise StoreError(
                    f"pair {pair.pair_id!r}: {column} {sample_id!r} is not a sample of {self.root}; append "
                    "samples first"
                )

    def _check_units(self, stage: str, iteration: int, shards: Sequence[Shard]) -> None:
        names = {shard.name for shard in shards}
        for shard, kind in product(shards, STAGE_KINDS.get(stage, ())):
            if shard.sibling(kind).name not in names:
                raise StoreError(
                    f"unit {shard.unit} of {stage} {iteration} is half written ({shard.name} without "
                    f"{shard.sibling(kind).name}); call discard_incomplete() and make the unit again"
                )
        units = {shard.unit for shard in shards}
        missing = sorted(set(range(max(units, default=-1) + 1)) - units)
        if missing and stage != "label":
            raise StoreError(
                f"{stage} {iteration} is not complete: units {missing} are missing; resume to make them"
            )


def _refuse_other_folder(root: Path) -> None:
    """A StoreError where a folder is not empty and no store."""
    # In this order: another process may make the store meanwhile, and `manifests` is the first that it makes.
    if not any(root.iterdir()) or (root / "manifests").is_dir():
        return
    if any(list_shards(root)):
        return
    inner = root / "store"
    hint = f"did you mean {inner}?" if (inner / "manifests").is_dir() else "expected a run's folder `store`"
    raise StoreError(f"{root} is not a store: it holds other things and no manifests/; {hint}")
