"""Bringing an offline preference set into a run's store as iteration 0, every image encoded once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from diffexpo.data.images import fit_image, nearest_size, size_name
from diffexpo.data.latents import encode_images, image_sizes
from diffexpo.data.offline.ahead import map_ahead
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.data.offline.image_files import whole_image
from diffexpo.data.offline.sources import fingerprint
from diffexpo.data.offline.votes import ImportReport, OfflinePair, read_votes
from diffexpo.data.offline.writing import QUARANTINE
from diffexpo.data.prompts import prompt_id
from diffexpo.data.rows import Pair, Sample
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
) -> ImportReport:
    """Append a preference set to the store as samples and pairs of iteration 0, source "offline".

    Resumable by unit and idempotent: what is in the store is not encoded again, and a second call only
    reports. Only one process may call it. Rows that could not be used are listed in `quarantine.jsonl` of
    the store. Images are fitted to the size that the policy draws; where it draws several, both images of a
    pair get the one that is nearest in shape to the winner.

    Args:
        path, format, limit, seed: As in `read_offline`.
        policy: Encodes images; the latents belong to it.
        store: Where rows go.
        accepts_prompt: False for prompts that are too long; such pairs are quarantined.
        unit_pairs: Pairs per unit.
        tick: Called after each unit.
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
    if store.is_complete(STAGE, ITERATION):
        done = store.manifest(STAGE, ITERATION)
        _refuse_other(done["origin"], origin, store)
        return ImportReport(**done["report"])
    store.discard_incomplete(STAGE, ITERATION)
    known = {sample.sample_id for sample in store.collected(ITERATION, stage=STAGE)}
    work = _Work(policy, store, accepts_prompt, sizes, origin, known)
    report = ImportReport()
    with replacing(store.root / QUARANTINE) as temporary, open(temporary, "wb") as log:
        report.log = log
        stream = read_votes(form, source, report, check="none", limit=limit, seed=seed)
        for unit, pairs in enumerate(iter(lambda: list(islice(stream, unit_pairs)), [])):
            work.append_unit(unit, pairs, report)
            tick()
        report.log = None
    if report.kept == 0:
        raise ImportFormatError(
            f"{path} gave no pair to learn from: {report.describe()}; first rows: {report.examples[:3]}"
        )
    if not report.quarantined:
        (store.root / QUARANTINE).unlink()
    store.write_manifest(STAGE, ITERATION, {"origin": origin, "report": report.to_json()})
    return report


@dataclass(frozen=True)
class _Work:
    policy: Policy
    store: Store
    accepts_prompt: Callable[[str], bool]
    sizes: tuple[tuple[int, int], ...]
    origin: Mapping[str, object]
    known: set[str]

    def append_unit(self, unit: int, pairs: Sequence[OfflinePair], report: ImportReport) -> None:
        """Store a unit unless it is in the store, and count it either way."""
        if not self.store.unit_done(ITERATION, unit, stage=STAGE):
            rows, unit_note = self._append_samples(unit, pairs)
            self.store.append_pairs(ITERATION, 0, rows, unit=unit, stage=STAGE, note=unit_note)
        note = self.store.note(ITERATION, unit, stage=STAGE)
        _refuse_other(note["origin"], self.origin, self.store)
        for row, reason in note["dropped"].items():
            report.kept -= 1
            report.quarantine(row, reason)
        for size, count in note.get("sizes", {}).items():
            report.sizes[size] = report.sizes.get(size, 0) + count

    def _append_samples(
        self, unit: int, pairs: Sequence[OfflinePair]
    ) -> tuple[list[Pair], dict[str, object]]:
        """Encode and store what is new; returns the unit's pair rows and its note."""
        dropped = {pair.row: "prompt too long" for pair in pairs if not self.accepts_prompt(pair.caption)}
        accepted = (pair for pair in pairs if pair.row not in dropped)
        samples: list[Sample] = []
        pixels: list[np.ndarray] = []
        rows: list[Pair] = []
        counts: Counter[str] = Counter()
        fit = partial(_fitted_pair, sizes=self.sizes)
        for pair, fitted in map_ahead(fit, accepted, lambda pair: pair.bytes):
            if isinstance(fitted, str):
                dropped[pair.row] = fitted
                continue
            size, decoded = fitted
            name = size_name(*size) if len(self.sizes) > 1 else ""
            *two_samples, row = _rows(pair, size, name)
            for sample, image in zip(two_samples, decoded, strict=True):
                if sample.sample_id not in self.known:
                    self.known.add(sample.sample_id)
                    samples.append(sample)
                    pixels.append(image)
            rows.append(row)
            if name:
                counts[name] += 1
        latents = encode_images(self.policy, pixels, _ENCODED_AT_ONCE)
        self.store.append_unit(ITERATION, 0, unit, samples, latents, stage=STAGE)
        note: dict[str, object] = {"origin": self.origin, "dropped": dropped}
        return rows, note | ({"sizes": counts} if counts else {})


_Fitted = tuple[tuple[int, int], list[np.ndarray]]


def _fitted_pair(pair: OfflinePair, sizes: Sequence[tuple[int, int]]) -> tuple[OfflinePair, _Fitted | str]:
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
