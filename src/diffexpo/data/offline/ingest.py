"""Bringing an offline preference set into a run's store as iteration 0, every image encoded once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from diffexpo.data.offline.writing import QUARANTINE, log_line
from diffexpo.data.prompts import prompt_id
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store
from diffexpo.errors import ImportFormatError, StoreError
from diffexpo.files import replacing
from diffexpo.types import Policy

STAGE, ITERATION = "offline", 0


# Many parameters because each is an option of `diffexpo data import`.
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
    reports. Only one process may call it. Rows that could not be used are listed in `quarantine.jsonl` of
    the store.

    Args:
        path: File or folder, see `read_offline`.
        policy: Encodes images; the latents belong to it.
        store: Where rows go.
        format: A key of `OFFLINE`, or "auto".
        limit, seed: At most this many pairs, chosen by key.
        judge: Who preferred, written in each pair.
        accepts_prompt: False for prompts that are too long; such pairs are quarantined.
        unit_pairs: Pairs per unit.
        batch_size: Images per call of the encoder.
        size: (height, width) to crop and resize to; by default what the policy draws. Where it draws several
            sizes, both images of a pair get the one that is nearest in shape to the winner.
        tick: Called after each unit.
    Returns:
        The report, the same whether the import ran through, was resumed or had been done before.
    """
    sizes = image_sizes(policy) if size is None else (size,)
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
        return ImportReport.from_json(done["report"])
    store.discard_incomplete(STAGE, ITERATION)
    known = {sample.sample_id for sample in store.collected(ITERATION, stage=STAGE)}
    work = _Work(policy, store, judge, accepts_prompt or (lambda text: True), batch_size, sizes, known)
    report = ImportReport()
    with replacing(store.root / QUARANTINE) as temporary, open(temporary, "wb") as log:
        report.log = partial(log_line, log)
        stream = read_votes(form, source, report, check="none", limit=limit, seed=seed)
        _append_units(work, stream, report, origin, unit_pairs, tick)
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
    stream: Iterator[OfflinePair],
    report: ImportReport,
    origin: Mapping[str, object],
    unit_pairs: int,
    tick: Callable[[], None],
) -> None:
    """Every unit of the set that is not in the store yet; the report counts them all."""
    store = work.store
    for unit, pairs in enumerate(iter(lambda: list(islice(stream, unit_pairs)), [])):
        if not store.unit_done(ITERATION, unit, stage=STAGE):
            rows, dropped, counts = _append_samples(work, unit, pairs)
            unit_note = {"origin": origin, "dropped": dropped} | ({"sizes": counts} if counts else {})
            store.append_pairs(ITERATION, 0, rows, unit=unit, stage=STAGE, note=unit_note)
        note = store.note(ITERATION, unit, stage=STAGE)
        _refuse_other(note["origin"], origin, store)
        for row, reason in note["dropped"].items():
            report.kept -= 1
            report.quarantine(row, reason)
        for size, count in note.get("sizes", {}).items():
            report.sizes[size] = report.sizes.get(size, 0) + count
        tick()


@dataclass(frozen=True)
class _Work:
    policy: Policy
    store: Store
    judge: str
    accepts_prompt: Callable[[str], bool]
    batch_size: int
    sizes: tuple[tuple[int, int], ...]
    known: set[str]


def _append_samples(
    work: _Work, unit: int, pairs: Sequence[OfflinePair]
) -> tuple[list[Pair], dict[str, str], dict[str, int]]:
    """Encode and store what is new in one unit; returns its pair rows, row -> reason of the dropped, and
    where there are several sizes the number of pairs of each.
    """
    accepted: list[OfflinePair] = []
    dropped: dict[str, str] = {}
    for pair in pairs:
        if work.accepts_prompt(pair.caption):
            accepted.append(pair)
        else:
            dropped[pair.row] = "prompt too long"
    samples: list[Sample] = []
    pixels: list[np.ndarray] = []
    rows: list[Pair] = []
    counts: Counter[str] = Counter()
    fit = partial(_fitted_pair, sizes=work.sizes)
    for pair, fitted in map_ahead(fit, iter(accepted), lambda pair: pair.bytes):
        if isinstance(fitted, str):
            dropped[pair.row] = fitted
            continue
        size, decoded = fitted
        name = size_name(*size) if len(work.sizes) > 1 else ""
        *two_samples, row = _rows(pair, size, name, work.judge)
        for sample, image in zip(two_samples, decoded, strict=True):
            if sample.sample_id not in work.known:
                work.known.add(sample.sample_id)
                samples.append(sample)
                pixels.append(image)
        rows.append(row)
        if name:
            counts[name] += 1
    latents = encode_images(work.policy, pixels, work.batch_size)
    by_id = {sample.sample_id: array for sample, array in zip(samples, latents, strict=True)}
    work.store.append_collection(ITERATION, 0, samples, by_id, unit=unit, stage=STAGE)
    return rows, dropped, dict(counts)


_Fitted = tuple[tuple[int, int], list[np.ndarray]]


def _fitted_pair(pair: OfflinePair, sizes: Sequence[tuple[int, int]]) -> tuple[OfflinePair, _Fitted | str]:
    """The pair with the size nearest in shape to the winner, and both images cropped and resized to it,
    winner first; or with the reason why it is dropped.

    A loser of another shape loses its borders: what is compared has one shape.
    """
    try:
        with whole_image(pair.winner_jpg) as image:
            size = nearest_size(image, sizes)
            winner = fit_image(image, *size)
        with whole_image(pair.loser_jpg) as image:
            loser = fit_image(image, *size)
    except ImportFormatError as error:
        return pair, str(error)
    return pair, (size, [winner, loser])


def _rows(pair: OfflinePair, size: tuple[int, int], name: str, judge: str) -> tuple[Sample, Sample, Pair]:
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
        judge=judge,
        margin=pair.margin,
        source="offline",
        winner_agent="offline",
        loser_agent="offline",
    )
    return winner, loser, own


def _sample_id(caption: str, data: bytes, size: str) -> str:
    """By content: the same image of the same prompt in two pairs is one sample, or one for each size it was
    fitted to."""
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
