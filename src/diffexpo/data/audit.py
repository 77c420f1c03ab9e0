"""Looking into a store: what a file is, where a pair came from, what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pyarrow.compute as pc

from diffexpo.data.latent_files import LatentFile, LatentPack
from diffexpo.data.listing import named_shards
from diffexpo.data.manifests import list_manifests, manifest_files, manifest_path
from diffexpo.data.rows import SCHEMAS, Pair, Sample, to_rows
from diffexpo.data.shards import Shard, advice, list_shards, read_header, read_rows
from diffexpo.errors import StoreError
from diffexpo.files import sha256_of

AT_ONCE = 1 << 26
"""Bytes of a store that a check reads before anything else is done."""


@dataclass(frozen=True)
class Lineage:
    """A pair's whole history.

    `explored` and `main` are its contrast couple, if it has one; `weights` has the SHA-256 of each agent's
    weights, `files` what the manifests say of each file: {"manifest", "sha256", "rows", "bytes"}.
    """

    pair: Pair
    winner: Sample
    loser: Sample
    explored: Sample | None
    main: Sample | None
    weights: dict[str, str | None]
    files: dict[str, dict[str, object]]


def describe_file(root: Path, shard: Shard) -> dict[str, object]:
    """A manifest's entry of one shard of rows: {"sha256", "rows", "bytes"}."""
    path = root / shard.name
    return {"sha256": sha256_of(path), "rows": read_header(path)[0], "bytes": path.stat().st_size}


class Check:
    """A look at everything that complete stages name: at once at what is there and how long it is, and at its
    content, where that is much in the background. One check a process."""

    def __init__(self, root: Path) -> None:
        self._root, self._problems = root, find_problems(root, reads=False)
        named = [manifest_files(root, *stage) for stage in list_manifests(root)] if not self._problems else []
        size = sum(int(str(entry["bytes"])) for files in named for entry in files.values())
        self._thread = Thread(target=self._read, daemon=True) if size else None
        if self._thread is not None and not self._problems:
            self._thread.start()
        if self._problems or size <= AT_ONCE:
            self.wait()

    def wait(self) -> None:
        """Until all is read; a StoreError lists what is wrong."""
        if self._thread is not None and not self._problems:
            self._thread.join()
        refuse(self._root, self._problems)

    def _read(self) -> None:
        try:
            self._problems += find_problems(self._root)
        except (OSError, ValueError) as error:
            self._problems.append(str(error))


def refuse(root: Path, problems: Sequence[str]) -> None:
    """A StoreError that lists problems, if there are any."""
    if problems:
        raise StoreError(f"{root} has {len(problems)} problems:\n  " + "\n  ".join(problems))


def find_problems(root: Path, *, reads: bool = True) -> list[str]:
    """Everything that is wrong with complete stages: files gone or changed, counts that do not match; without
    reading the files only what their length tells."""
    found = []
    for stage, iteration in list_manifests(root):
        manifest = manifest_path(root, stage, iteration).name
        try:
            files = manifest_files(root, stage, iteration)
        except StoreError as error:
            found.append(str(error))
            continue
        for name, entry in files.items():
            try:
                found.append(_compare(root, name, entry, manifest, reads))
            except StoreError as error:
                found.append(str(error))
    return [problem for problem in found if problem]


def trace(root: Path, pair_id: str, sample: Callable[[str], Sample]) -> Lineage:
    """The history of a pair, given what finds a sample by its id."""
    shard, pair = _find_pair(root, pair_id)
    winner, loser = sample(pair.winner_id), sample(pair.loser_id)
    explored, main = (None if name is None else sample(name) for name in (pair.explored_id, pair.main_id))
    known = [one for one in (winner, loser, explored, main) if one is not None]
    files = {shard.name}
    for one in known:
        files |= {one.latent_file, Shard.named(one.latent_file).sibling("samples").name}
    weights = {one.agent: one.weights for one in known}
    described = {name: _provenance(root, name) for name in sorted(files)}
    return Lineage(pair, winner, loser, explored, main, weights, described)


def _find_pair(root: Path, pair_id: str) -> tuple[Shard, Pair]:
    packs = [shard for shard in named_shards(root, "pairs") if shard.is_pack]
    for shard in [*packs, *list_shards(root, "pairs")]:
        table = read_rows(root / shard.name, SCHEMAS["pairs"])
        for pair in to_rows(table.filter(pc.equal(table["pair_id"], pair_id)), Pair):
            return shard, pair
    raise StoreError(f"there is no pair {pair_id!r} in {root}; `pairs()` lists them")


def _provenance(root: Path, name: str) -> dict[str, object]:
    """The manifest that names a shard (None while its stage is not complete) and what it says of it."""
    shard = Shard.named(name)
    entry = manifest_files(root, shard.stage, shard.iteration).get(name)
    if entry is None:
        return {"manifest": None}
    return {"manifest": manifest_path(root, shard.stage, shard.iteration).name, **entry}


def _compare(root: Path, name: str, entry: Mapping[str, object], manifest: str, reads: bool) -> str:
    path = root / name
    if not path.exists():
        return f"{name} is missing although {manifest} names it; {advice(path)}"
    length = path.stat().st_size
    if length != entry.get("bytes", length):
        return f"{name} has {length} bytes, {manifest} says {entry['bytes']}; {advice(path)}"
    if not reads:
        return ""
    digest = sha256_of(path)
    if digest != entry["sha256"]:
        said = f"{manifest} says {entry['sha256']}: the file has changed"
        return f"{name} has sha256 {digest}, {said}; {advice(path)}"
    shard = Shard.parse(name)
    if shard is not None and shard.kind != "latents":
        count, what = read_rows(path, SCHEMAS[shard.kind], SCHEMAS[shard.kind].names[:1]).num_rows, "rows"
    else:
        is_pack = shard is not None and shard.is_pack
        count, what = len(LatentPack(path)) if is_pack else len(LatentFile(path).names), "latents"
    return "" if count == entry["rows"] else f"{name} holds {count} {what}, {manifest} says {entry['rows']}"
