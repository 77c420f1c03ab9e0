"""Any preference set as Parquet shards in the Pick-a-Pic v2 columns: verified pairs, no model needed.

    FOLDER/import.json             what is imported: written first
    FOLDER/pairs-00000.parquet     2,048 pairs or 64 MiB per shard, whichever comes first
    FOLDER/quarantine.jsonl        one line for each row that could not be used: {"row", "reason", "rows"}
    FOLDER/manifest.json           counts, SHA-256 and rows of every file: written last, means complete

Each shard carries, in its Parquet metadata, the counts up to its last pair and the length of quarantine.jsonl
at that moment. A killed import goes on after the last whole shard, so no pair is lost and none comes twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.bounded.texts import parse_json, read_json
from diffexpo.data.export import EXPORT_SCHEMA, SCHEMA_VERSION
from diffexpo.data.offline.ahead import one_ahead
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.data.offline.pickapic import FINISHED, STARTED
from diffexpo.data.offline.sources import fingerprint
from diffexpo.data.offline.votes import Check, ImportReport, OfflinePair, read_votes
from diffexpo.errors import ImportFormatError, MissingError, StoreError
from diffexpo.files import TEMPORARY, replacing, sha256_of, write_text
from diffexpo.rng import keyed_choice

SHARD_PAIRS = 2048
SHARD_BYTES = 64 * 1024 * 1024
QUARANTINE = "quarantine.jsonl"
FORMAT = 1
_GROUP_BYTES = 8 * 1024 * 1024
_GROUP_PAIRS = 256
_STATE = b"diffexpo_import"
_IMAGES = ("jpg_0", "jpg_1")
_OURS = ("pair_id", "reward_margin", "source", "confidence", "schema_version")
SCHEMA = pa.schema([*list(EXPORT_SCHEMA)[:19], *(EXPORT_SCHEMA.field(name) for name in _OURS)])
"""The 19 columns of Pick-a-Pic v2 in its order, then ours."""
_PARQUET: dict[str, Any] = {
    # images are compressed already, and each differs from the others
    "compression": {name: "none" if name in _IMAGES else "zstd" for name in SCHEMA.names},
    "use_dictionary": [name for name in SCHEMA.names if name not in _IMAGES],
    "write_statistics": False,
    "write_page_checksum": True,
}


def rewrite_pairs(
    source: str | Path,
    folder: str | Path,
    *,
    format: str = AUTO,
    limit: int | None = None,
    seed: int = 0,
    check: Check = "structure",
    shard_pairs: int = SHARD_PAIRS,
    tick: Callable[[int], None] = lambda pairs: None,
) -> ImportReport:
    """Write the usable pairs of a set, their images verified, as a folder of Parquet shards.

    Resumable after any kill and idempotent: called again, it goes on after the last whole shard, or only
    reports.

    Args:
        source, format, limit, seed: As in `read_offline`.
        folder: Where the shards go; made if need be.
        check: As in `read_votes`; "structure" takes a fraction of the time and finds files that are cut. The
            run that encodes the images finds what is left.
        shard_pairs: Pairs per shard.
        tick: Called with the pairs of each shard that was written, while the next one is read.
    Returns:
        The report, the same whether the import ran through or was resumed.
    """
    source, folder = Path(source), Path(folder)
    name, form = find_format(format, source)
    origin = {
        "format": name,
        "files": fingerprint(form.files(source), source),
        "limit": limit,
        "seed": seed if limit is not None else 0,
        "shard_pairs": shard_pairs,
        "check": check,
    }
    _begin(folder, source, origin)
    if (folder / FINISHED).exists():
        return ImportReport(**_read_json(folder / FINISHED)["report"])
    report, digests = _resumed(folder)
    pairs = read_votes(form, source, report, check=check, limit=limit, seed=seed)
    with open(folder / QUARANTINE, "ab") as log:
        report.log = log
        with closing(one_ahead(_groups(pairs, report, log, shard_pairs))) as groups:
            for group in groups:
                path = folder / f"pairs-{len(digests):05d}.parquet"
                digests[path.name], num_pairs = _write_shard(path, chain([group], groups))
                tick(num_pairs)
        report.log = None
    if report.kept == 0:
        raise ImportFormatError(
            f"{source} gave no pair: {report.describe()}; every such row is in {folder / QUARANTINE}; first "
            f"rows: {report.examples[:3]}"
        )
    digests[QUARANTINE] = sha256_of(folder / QUARANTINE)
    files = {name: _entry(folder / name, digest) for name, digest in digests.items()}
    _write_json(folder / FINISHED, {"format": FORMAT, "report": report.to_json(), "files": files})
    return report


_Group = tuple[list[dict[str, object]], bytes]
"""Rows that are written together, and what the metadata says of the shard if they complete it."""


def _groups(
    pairs: Iterator[OfflinePair], report: ImportReport, log: IO[bytes], shard_pairs: int
) -> Iterator[_Group]:
    """The rows of the pairs in groups, each shard's last one with its state."""
    rows: list[dict[str, object]] = []
    num_pairs = group_bytes = shard_bytes = 0
    for pair in pairs:
        rows.append(_row(pair))
        num_pairs += 1
        group_bytes += pair.bytes
        shard_bytes += pair.bytes
        is_full = num_pairs >= shard_pairs or shard_bytes >= SHARD_BYTES
        if is_full or len(rows) >= _GROUP_PAIRS or group_bytes >= _GROUP_BYTES:
            yield rows, _state(report, log) if is_full else b""
            rows, group_bytes = [], 0
            if is_full:
                num_pairs = shard_bytes = 0
    state = _state(report, log)
    if num_pairs:
        yield rows, state


def _state(report: ImportReport, log: IO[bytes]) -> bytes:
    log.flush()
    os.fsync(log.fileno())
    return json.dumps({"report": report.to_json(), "quarantine_bytes": log.tell()}).encode()


def _write_shard(path: Path, groups: Iterator[_Group]) -> tuple[str, int]:
    """Write groups as one file, up to the one with a state; its SHA-256 and its number of pairs."""
    num_pairs = 0
    with replacing(path) as temporary:
        with _parquet(path, temporary) as writer:
            for rows, state in groups:
                num_pairs += len(rows)
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                if state:
                    writer.add_key_value_metadata({_STATE: state})
                    break
        return sha256_of(temporary), num_pairs


@contextmanager
def _parquet(path: Path, temporary: Path) -> Iterator[pq.ParquetWriter]:
    """A writer of a shard; turns what a full or read-only disk raises into one clear error."""
    writer = None
    try:
        writer = pq.ParquetWriter(str(temporary), SCHEMA, **_PARQUET)
        yield writer
        writer.close()
    except OSError as error:
        advice = "Whole shards are kept: free space and repeat the import."
        raise StoreError(f"could not write {path}: {error.strerror or error}. {advice}") from error
    finally:
        if writer is not None:
            # else it would try once more when it is collected, and print that it cannot
            writer.is_open = False


def verify_rewritten(folder: str | Path) -> int:
    """Recompute every SHA-256 and row count of an import folder; returns the number of files. A StoreError
    lists every problem."""
    folder = Path(folder)
    if not (folder / FINISHED).is_file():
        raise MissingError(
            f"{folder} has no {FINISHED}: it is no import, or one that was not finished; import again"
        )
    body = _read_json(folder / FINISHED)
    problems = []
    for name, entry in body["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256_of(path) != entry["sha256"]:
            problems.append(f"{name} has changed: its sha256 is not that of {FINISHED}")
    extra = {path.name for path in folder.glob("*.parquet")} - set(body["files"])
    problems += [f"{name} is not named by {FINISHED}" for name in sorted(extra)]
    rows = sum(entry["rows"] for name, entry in body["files"].items() if name != QUARANTINE)
    if rows != body["report"]["kept"]:
        problems.append(f"{FINISHED} counts {body['report']['kept']} pairs, its shards hold {rows}")
    if problems:
        raise StoreError(f"{folder} has {len(problems)} problems:\n  " + "\n  ".join(problems))
    return len(body["files"])


def _row(pair: OfflinePair) -> dict[str, object]:
    """A pair in the Pick-a-Pic columns."""
    # a winner that always came first would teach a reader of the file the position
    winner = keyed_choice(2, "import", pair.row)
    row: dict[str, object] = {
        "are_different": True,
        "best_image_uid": pair.winner_uid,
        "caption": pair.caption,
        "has_label": True,
        "pair_id": pair.row,
        "reward_margin": pair.margin,
        "source": "offline",
        "confidence": pair.confidence,
        "schema_version": SCHEMA_VERSION,
    }
    for side, role in ((winner, "winner"), (1 - winner, "loser")):
        row[f"label_{side}"] = float(side == winner)
        row[f"image_{side}_uid"] = getattr(pair, f"{role}_uid")
        row |= {f"{name}_{side}": getattr(pair, f"{role}_{name}") for name in ("jpg", "model")}
    return row


def _begin(folder: Path, source: Path, origin: Mapping[str, object]) -> None:
    """Claim the folder for one import, or find that it is this one's already."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / STARTED
    if not mark.exists():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.endswith(TEMPORARY))
        if foreign:
            raise StoreError(f"{folder} is not empty ({foreign[0]}, ...); name a new folder for the import")
        _write_json(mark, {"format": FORMAT, "source": str(source), "origin": dict(origin)})
        return
    known = {"check": "decode", **_read_json(mark)["origin"]}
    changed = [name for name in origin if known.get(name) != origin[name]]
    if changed:
        raise StoreError(
            f"{folder} holds another import: {', '.join(changed)} differ (there {known.get(changed[0])!r}, "
            f"now {origin[changed[0]]!r}); name a new folder, or give the settings that this one was begun "
            "with"
        )


def _resumed(folder: Path) -> tuple[ImportReport, dict[str, str]]:
    """The counts and every SHA-256 up to the last whole shard; what was left behind it is removed."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()
    shards = sorted(folder.glob("pairs-*.parquet"))
    for number, path in enumerate(shards):
        if path.name != f"pairs-{number:05d}.parquet":
            raise StoreError(
                f"{folder} lacks pairs-{number:05d}.parquet but holds {path.name}; import into a new folder"
            )
    log = folder / QUARANTINE
    state: dict[str, Any] = {"report": ImportReport().to_json(), "quarantine_bytes": 0}
    if shards:
        try:
            state = parse_json(pq.read_metadata(shards[-1]).metadata[_STATE])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{shards[-1]} is damaged ({error}); delete it and import again") from error
    log.touch()
    if log.stat().st_size < state["quarantine_bytes"]:
        raise StoreError(f"{log} is shorter than {shards[-1].name} says; import into a new folder")
    os.truncate(log, state["quarantine_bytes"])
    return ImportReport(**state["report"]), {path.name: sha256_of(path) for path in shards}


def _entry(path: Path, digest: str) -> dict[str, object]:
    is_log = path.name == QUARANTINE
    with open(path, "rb") as file:
        rows = sum(1 for _ in file) if is_log else pq.read_metadata(file).num_rows
    return {"sha256": digest, "rows": rows, "bytes": path.stat().st_size}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = read_json(path)
        if body["format"] != FORMAT:
            raise StoreError(f"{path} has format {body['format']!r}, this version reads {FORMAT}")
        return body
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); import into a new folder") from error


def _write_json(path: Path, body: Mapping[str, object]) -> None:
    write_text(path, json.dumps(body, indent=1, sort_keys=True) + "\n")
