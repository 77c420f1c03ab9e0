"""Bringing an offline preference set into a run's store as iteration 0, every picture encoded once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from diffexpo.data.files import whole_file
from diffexpo.data.images import fit_image
from diffexpo.data.latents import encode_pixels, image_size
from diffexpo.data.offline.base import (
    Format,
    ImportReport,
    OfflinePair,
    decode_picture,
    fingerprint,
    read_votes,
)
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.data.offline.rewrite import QUARANTINE
from diffexpo.data.prompts import prompt_id
from diffexpo.data.store import Store
from diffexpo.errors import ImportFormatError, StoreError
from diffexpo.types import Policy

STAGE, ITERATION = "offline", 0

Row = dict[str, object]


def import_offline(
    path: str | Path,
    policy: Policy,
    store: Store,
    *,
    format: str = AUTO,
    limit: int | None = None,
    seed: int = 0,
    judge: str = "offline",
    accepts_prompt: Callable[[str], bool] | None = None,
    unit_pairs: int = 256,
    batch_size: int = 16,
    size: tuple[int, int] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> ImportReport:
    """Append a preference set to the store as samples and pairs of iteration 0, source "offline".

    Resumable by unit and idempotent: what is in the store is not encoded again, and a second call only
    reports. One process. Rows that could not be used stand in the store's `quarantine.jsonl`.

    Args:
        path: File or folder, see `read_offline`.
        policy: Encodes pictures; the latents belong to it.
        store: Where rows go.
        format: A key of `OFFLINE`, or "auto".
        limit, seed: At most this many pairs, chosen by key.
        judge: Who preferred, written in each pair.
        accepts_prompt: False for prompts that are too long; such pairs are quarantined.
        unit_pairs: Pairs a unit.
        batch_size: Pictures an encoder call.
        size: (height, width) to crop and resize to; by default what the policy draws.
        tick: Called after each unit.
    Returns:
        The report, the same whether the import ran through, was resumed or had been done before.
    Raises:
        MissingError, ImportFormatError: from reading; ImportFormatError too when no pair is left.
        StoreError: the store holds another offline set.
    """
    size = image_size(policy) if size is None else size
    source = Path(path)
    name, form = find_format(format, source)
    origin = {
        "files": fingerprint(form.files(source), source),
        "format": name,
        "policy": policy.fingerprint,
        "limit": limit,
        "seed": seed if limit is not None else 0,
        "size": list(size),
        "unit_pairs": unit_pairs,
    }
    if store.is_complete(STAGE, ITERATION):
        done = store.manifest(STAGE, ITERATION)
        _refuse_other(done["origin"], origin, store)
        return ImportReport.from_json(done["report"])
    store.discard_incomplete(STAGE, ITERATION)
    known = {str(row["sample_id"]) for row in store.collected(ITERATION, stage=STAGE)}
    work = _Work(policy, store, judge, accepts_prompt, batch_size, size, known)
    report = ImportReport()
    with whole_file(store.root / QUARANTINE) as temporary, open(temporary, "w", encoding="utf-8") as log:
        report.log = lambda row, reason, rows: print(
            json.dumps({"row": row, "reason": reason, "rows": rows}), file=log
        )
        _append_units(work, form, source, report, origin, limit, seed, unit_pairs, tick)
        report.log = None
    if report.kept == 0:
        raise ImportFormatError(
            f"{path} gave no pair to learn from: {report.describe()}; first rows: {report.examples[:3]}"
        )
    if not report.quarantined:
        (store.root / QUARANTINE).unlink()
    store.write_manifest(STAGE, ITERATION, {"origin": origin, "report": report.to_json()})
    return report


def _append_units(
    work: _Work,
    form: Format,
    source: Path,
    report: ImportReport,
    origin: Mapping[str, object],
    limit: int | None,
    seed: int,
    unit_pairs: int,
    tick: Callable[[], None],
) -> None:
    """Every unit of the set that is not in the store yet; the report counts them all."""
    store = work.store
    stream = read_votes(form, source, report, check_images=False, limit=limit, seed=seed)
    for unit, pairs in enumerate(_chunks(stream, unit_pairs)):
        if not store.unit_done(ITERATION, unit, stage=STAGE):
            rows, dropped = _append_samples(work, unit, pairs)
            store.append_pairs(
                ITERATION, 0, rows, unit=unit, stage=STAGE, note={"origin": origin, "dropped": dropped}
            )
        note = store.note(ITERATION, unit, stage=STAGE)
        _refuse_other(note["origin"], origin, store)
        for row, reason in note["dropped"].items():
            report.kept -= 1
            report.quarantine(row, reason)
        tick()


@dataclass(frozen=True)
class _Work:
    policy: Policy
    store: Store
    judge: str
    accepts_prompt: Callable[[str], bool] | None
    batch_size: int
    size: tuple[int, int]
    known: set[str]


def _append_samples(work: _Work, unit: int, pairs: Sequence[OfflinePair]) -> tuple[list[Row], dict[str, str]]:
    """Encode and store what is new in one unit; returns its pair rows, and row -> reason of the dropped."""
    samples: list[Row] = []
    pixels: list[np.ndarray] = []
    rows: list[Row] = []
    dropped: dict[str, str] = {}
    for pair in pairs:
        if work.accepts_prompt is not None and not work.accepts_prompt(pair.caption):
            dropped[pair.row] = "prompt too long"
            continue
        try:
            decoded = [
                fit_image(decode_picture(data), *work.size) for data in (pair.winner_jpg, pair.loser_jpg)
            ]
        except ImportFormatError as error:
            dropped[pair.row] = str(error)
            continue
        ids = [_sample_id(pair.caption, data) for data in (pair.winner_jpg, pair.loser_jpg)]
        for sample_id, picture, model in zip(
            ids, decoded, (pair.winner_model, pair.loser_model), strict=True
        ):
            if sample_id not in work.known:
                work.known.add(sample_id)
                samples.append(_sample_row(sample_id, pair.caption, model))
                pixels.append(picture)
        rows.append(_pair_row(pair, ids, work.judge))
    stack = np.stack(pixels) if pixels else np.zeros((0, *work.size, 3), np.uint8)
    latents = encode_pixels(work.policy, stack, work.batch_size)
    work.store.append_unit(ITERATION, 0, unit, samples, latents, stage=STAGE)
    return rows, dropped


def _sample_row(sample_id: str, caption: str, model: str | None) -> Row:
    return {
        "sample_id": sample_id,
        "prompt_id": prompt_id(caption),
        "prompt": caption,
        "agent": "offline",
        "model": model,
        "source": "offline",
    }


def _pair_row(pair: OfflinePair, ids: Sequence[str], judge: str) -> Row:
    return {
        "pair_id": f"offline-{pair.row}",
        "iteration": ITERATION,
        "prompt_id": prompt_id(pair.caption),
        "prompt": pair.caption,
        "winner_id": ids[0],
        "loser_id": ids[1],
        "judge": judge,
        "margin": pair.margin,
        "source": "offline",
        "winner_agent": "offline",
        "loser_agent": "offline",
    }


def _sample_id(caption: str, data: bytes) -> str:
    """By content: the same picture of the same prompt in two pairs is one sample."""
    digest = hashlib.blake2b(data, digest_size=12)
    digest.update(b"\0" + caption.encode())
    return f"offline-{digest.hexdigest()}"


def _chunks(stream: Iterator[OfflinePair], size: int) -> Iterator[list[OfflinePair]]:
    while chunk := list(islice(stream, size)):
        yield chunk


def _refuse_other(stored: object, origin: Mapping[str, object], store: Store) -> None:
    if stored != origin:
        known = stored if isinstance(stored, dict) else {}
        changed = [name for name in origin if known.get(name) != origin[name]]
        raise StoreError(
            f"{store.root} holds another offline set: {', '.join(changed)} differ (stored "
            f"{known.get(changed[0])!r}, now "
            f"{origin[changed[0]]!r}); a store keeps its offline pairs, so start a new run"
        )
