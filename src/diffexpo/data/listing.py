"""Which shards there are: of complete stages by their manifests, of others as the folder has them."""

from __future__ import annotations

from pathlib import Path

from diffexpo.data.manifests import list_manifests, manifest_files, manifest_path
from diffexpo.data.packs import is_packed
from diffexpo.data.rows import SCHEMAS
from diffexpo.data.shards import Shard, in_order, list_shards, read_rows
from diffexpo.errors import StoreError


def named_shards(root: Path, kind: str, iteration: int | None = None) -> list[Shard]:
    """Shards of complete stages, of one iteration or of all; an iteration that has shards but no manifest is
    a StoreError."""
    complete = list_manifests(root)
    begun = list_shards(root, kind, iteration=iteration) if iteration is not None else []
    for stage, number in {(shard.stage, shard.iteration) for shard in begun}:
        if (stage, number) not in complete:
            raise StoreError(
                f"{stage} {number} is not complete: {manifest_path(root, stage, number)} is missing. Resume "
                "the run to finish it; `collected()` reads finished units."
            )
    chosen = (stage for stage in complete if iteration in (None, stage[1]))
    found = (Shard.parse(name) for stage in chosen for name in manifest_files(root, *stage))
    return in_order(shard for shard in found if shard is not None and shard.kind == kind)


def shards_of_stage(root: Path, kind: str, stage: str, iteration: int) -> list[Shard]:
    """Shards of a stage, whether it is complete or not."""
    files = manifest_files(root, stage, iteration)
    if not is_packed(files):
        return list_shards(root, kind, stage, iteration)
    return in_order(shard for shard in map(Shard.named, files) if shard.kind == kind)


def written_units(root: Path, kind: str, stage: str, iteration: int) -> set[int]:
    """Units of a stage whose shard of a kind is written; of a complete stage those that have samples."""
    shards = shards_of_stage(root, kind, stage, iteration)
    units = {shard.unit for shard in shards if not shard.is_pack}
    for pack in (shard.sibling("samples") for shard in shards if shard.is_pack):
        column = read_rows(root / pack.name, SCHEMAS["samples"], ["unit"])["unit"]
        units |= {int(unit) for unit in column.unique().to_pylist()}
    return units
