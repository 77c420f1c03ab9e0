"""Bringing an offline preference set into a run's store as iteration 0, every image encoded once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from diffexpo.bounded.images import whole_image
from diffexpo.data.images import fit_image, nearest_size, size_name
from diffexpo.data.latents import encode_images, image_sizes
from diffexpo.data.offline.ahead import map_ahead
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.data.offline.sources import fingerprint
from diffexpo.data.offline.votes import ImportReport, OfflinePair, read_votes
from diffexpo.data.offline.writing import QUARANTINE
from diffexpo.data.prompts import prompt_id
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.sharing import Alone, Processes
from diffexpo.data.store import Store
from diffexpo.errors import ImportFormatError, StoreError
from diffexpo.files import replacing
from diffexpo.types import Policy

STAGE, ITERATION = "offline", 0
_ENCODED_AT_ONCE = 16


# Many parameters because each is an option of `diffexpo data import`.
def import_offline(
    path: str | Path,
    policy: Policy,
    store: Store,
    *,
    format: str = AUTO,
    limit: int | None = None,
    seed: int = 0,
    accepts_prompt: Callable[[str], bool] = lambda text: True,
    unit_pairs: int = 256,
    tick: Callable[[], None] = lambda: None,
    world: Processes | None = None,
) -> ImportReport:
    """Append a preference set to the store as samples and pairs of iteration 0, source "offline".

    Resumable by unit and idempotent: what is in the store is not encoded again, and a second call only
    reports. Several processes take every other unit, and end with the same bits as one. Rows that could not
    be used are listed in `quarantine.jsonl` of the store. Images are fitted to the size that the policy
    draws; where it draws several, both images of a pair get the one that is nearest in shape to the winner.

    Args:
        path, format, limit, seed: As in `read_offline`.
        policy: Encodes images; the latents belong to it.
        store: Where rows go.
        accepts_prompt: False for prompts that are too long; such pairs are quarantined.
        unit_pairs: Pairs per unit.
        tick: Called after each unit of this process.
        world: The processes that share the work; None: this one alone.
    Returns:
        The report, the same whether the import ran through, was resumed or had been done before.
    """
    sizes = image_sizes(policy)
    source = Path(path)
    name, form = find_format(format, source)
    origin: dict[str, object] = {
        "files": fingerprint(form.files(source), source),
        "format": name,
        "policy": policy.fingerprint,
        "limit": limit,
        "seed": seed if limit is not None else 0,
        "size": list(sizes[0]),
        "unit_pairs": unit_pairs,
    }
    if len(sizes) > 1:
        origin["buckets"] = [list(other) for other in sizes[1:]]
    world = world or Alone()
    # The first process's answer is everybody's: a late one could find complete what has just been finished.
    if world.gather_objects([store.is_complete(STAGE, ITERATION)] * (world.rank == 0))[0]:
        done = store.manifest(STAGE, ITERATION)
        _refuse_other(done["origin"], origin, store)
        return ImportReport(**done["report"])
    if world.rank == 0:
        store.discard_incomplete(STAGE, ITERATION)
    world.barrier()
    known = {sample.sample_id for sample in store.collected(ITERATION, stage=STAGE)}
    work = _Work(policy, store, accepts_prompt, sizes, origin, known, world)
    report = ImportReport()
    with _quarantine(store, report, world):
        stream = read_votes(form, source, report, check="none", limit=limit, seed=seed)
        units = iter(lambda: list(islice(stream, unit_pairs)), [])
        for first in count(step=world.size):
            batch = list(islice(units, world.size))
            if not batch:
                break
            work.append_units(first, batch)
            tick()
        world.barrier()
        for _, note in sorted(store.notes(ITERATION, stage=STAGE).items()):
            _add_note(report, note, origin, store)
    if report.kept == 0:
        raise ImportFormatError(
            f"{path} gave no pair to learn from: {report.describe()}; first rows: {report.examples[:3]}"
        )
    world.barrier()  # every process has read the notes before the units become packs
    if world.rank == 0:
        if not report.quarantined:
            (store.root / QUARANTINE).unlink()
        store.write_manifest(STAGE, ITERATION, {"origin": origin, "report": report.to_json()})
    world.barrier()
    return report


@contextmanager
def _quarantine(store: Store, report: ImportReport, world: Processes) -> Iterator[None]:
    """The first process lists what could not be used."""
    if world.rank > 0:
        yield
        return
    with replacing(store.root / QUARANTINE) as temporary, open(temporary, "wb") as log:
        report.log = log
        yield
        report.log = None


def _add_note(
    report: ImportReport, note: Mapping[str, Any], origin: Mapping[str, object], store: Store
) -> None:
    """Count what a unit has dropped, and the sizes of its pairs."""
    _refuse_other(note["origin"], origin, store)
    for row, reason in note["dropped"].items():
        report.kept -= 1
        report.quarantine(row, reason)
    for size, number in note.get("sizes", {}).items():
        report.sizes[size] = report.sizes.get(size, 0) + number


@dataclass(frozen=True)
class _Work:
    policy: Policy
    store: Store
    accepts_prompt: Callable[[str], bool]
    sizes: tuple[tuple[int, int], ...]
    origin: Mapping[str, object]
    known: set[str]

    world: Processes

    def append_units(self, first: int, units: Sequence[Sequence[OfflinePair]]) -> None:
        """Store this process's one of as many units as there are processes, unless it is in the store.

        An image belongs to the first unit that has it, whoever encodes that.
        """
        fitted, number = None, first + self.world.rank
        if self.world.rank < len(units) and not self.store.unit_done(ITERATION, number, stage=STAGE):
            fitted = self._fit(units[self.world.rank])
        names = [] if fitted is None else [sample.sample_id for sample, _ in fitted.images]
        everybody = self.world.gather_objects([names])
        for rank, others in enumerate(everybody):
            if rank == self.world.rank and fitted is not None:
                self._append_images(number, fitted)
            self.known.update(others)
        self.world.barrier()  # a pair may have an image that another process has just stored
        if fitted is not None:
            self._append_pairs(number, fitted)

    def _fit(self, pairs: Sequence[OfflinePair]) -> _Fitted:
        """A unit's rows, with the images of its samples at their size."""
        fitted = _Fitted(
            {pair.row: "prompt too long" for pair in pairs if not self.accepts_prompt(pair.caption)}
        )
        accepted = (pair for pair in pairs if pair.row not in fitted.dropped)
        fit = partial(_fitted_pair, sizes=self.sizes)
        for pair, found in map_ahead(fit, accepted, lambda pair: pair.bytes):
            if isinstance(found, str):
                fitted.dropped[pair.row] = found
                continue
            size, decoded = found
            name = size_name(*size) if len(self.sizes) > 1 else ""
            *samples, row = _rows(pair, size, name)
            fitted.images += zip(samples, decoded, strict=True)
            fitted.rows.append(row)
            if name:
                fitted.sizes[name] += 1
        return fitted

    def _append_images(self, unit: int, fitted: _Fitted) -> None:
        """Encode and store what is new."""
        new = {
            sample.sample_id: (sample, image)
            for sample, image in reversed(fitted.images)
            if sample.sample_id not in self.known
        }
        order = [name for name in dict.fromkeys(one.sample_id for one, _ in fitted.images) if name in new]
        samples, pixels = [new[name][0] for name in order], [new[name][1] for name in order]
        latents = encode_images(self.policy, pixels, _ENCODED_AT_ONCE)
        self.store.append_unit(ITERATION, self.world.rank, unit, samples, latents, stage=STAGE)

    def _append_pairs(self, unit: int, fitted: _Fitted) -> None:
        note: dict[str, object] = {"origin": self.origin, "dropped": fitted.dropped}
        note |= {"sizes": fitted.sizes} if fitted.sizes else {}
        self.store.append_pairs(ITERATION, self.world.rank, fitted.rows, unit=unit, stage=STAGE, note=note)


@dataclass
class _Fitted:
    """A unit of pairs: why some are dropped, the others' rows, and their samples with their images."""

    dropped: dict[int | str, str]
    rows: list[Pair] = field(default_factory=list)
    images: list[tuple[Sample, np.ndarray]] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)


_Sized = tuple[tuple[int, int], list[np.ndarray]]


def _fitted_pair(pair: OfflinePair, sizes: Sequence[tuple[int, int]]) -> tuple[OfflinePair, _Sized | str]:
    """The pair with its size and both images fitted to it, winner first, or with why it is dropped."""
    try:
        with whole_image(pair.winner_jpg) as image:
            size = nearest_size(image, sizes)
            winner = fit_image(image, *size)
        with whole_image(pair.loser_jpg) as image:
            loser = fit_image(image, *size)
    except ImportFormatError as error:
        return pair, str(error)
    return pair, (size, [winner, loser])


def _rows(pair: OfflinePair, size: tuple[int, int], name: str) -> tuple[Sample, Sample, Pair]:
    """What the store holds of a pair: both samples, winner first, and the pair itself."""
    number = prompt_id(pair.caption)
    winner, loser = (
        Sample(
            sample_id=_sample_id(pair.caption, data, name),
            prompt_id=number,
            prompt=pair.caption,
            agent="offline",
            model=model,
            source="offline",
            height=size[0],
            width=size[1],
        )
        for data, model in ((pair.winner_jpg, pair.winner_model), (pair.loser_jpg, pair.loser_model))
    )
    own = Pair(
        pair_id=f"offline-{pair.row}",
        iteration=ITERATION,
        prompt_id=number,
        prompt=pair.caption,
        winner_id=winner.sample_id,
        loser_id=loser.sample_id,
        judge="offline",
        margin=pair.margin,
        source="offline",
        winner_agent="offline",
        loser_agent="offline",
    )
    return winner, loser, own


def _sample_id(caption: str, data: bytes, size: str) -> str:
    """By content: the same image of the same prompt is one sample for each size it is fitted to."""
    digest = hashlib.blake2b(data, digest_size=12)
    digest.update(b"\0" + caption.encode())
    if size:
        digest.update(b"\0" + size.encode())
    return f"offline-{digest.hexdigest()}"


def _refuse_other(stored: object, origin: Mapping[str, object], store: Store) -> None:
    if stored != origin:
        known = stored if isinstance(stored, dict) else {}
        changed = [name for name in {**origin, **known} if known.get(name) != origin.get(name)]
        raise StoreError(
            f"{store.root} holds another offline set: {', '.join(changed)} differ (stored "
            f"{known.get(changed[0])!r}, now {origin.get(changed[0])!r}); a store keeps its offline pairs, "
            "so start a new run"
        )
