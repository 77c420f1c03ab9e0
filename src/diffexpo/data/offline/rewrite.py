"""Any preference set as Parquet shards in the Pick-a-Pic v2 columns: verified pairs, no model needed.

    FOLDER/import.json             what is imported: written first
    FOLDER/pairs-00000.parquet     2,048 pairs or 64 MiB a shard, whichever comes first
    FOLDER/quarantine.jsonl        one line a row that could not be used: {"row", "reason", "rows"}
    FOLDER/manifest.json           counts, SHA-256 and rows of every file: written last, means complete

Each shard carries, in its Parquet metadata, the counts up to its last pair and the length of quarantine.jsonl
at that moment. A killed import goes on behind the last whole shard, so no pair is lost and none comes twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.data.files import TEMPORARY, sha256_of, write_whole
from diffexpo.data.offline.ahead import Behind
from diffexpo.data.offline.base import Check, ImportReport, OfflinePair, fingerprint, read_votes
from diffexpo.data.offline.exported import FINISHED, STARTED
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.data.offline.shard import STATE, Shard
from diffexpo.errors import ImportFormatError, MissingError, StoreError

SHARD_PAIRS = 2048
SHARD_BYTES = 64 * 1024 * 1024
QUARANTINE = "quarantine.jsonl"
FORMAT = 1


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
    """Write the usable pairs of a set, their pictures verified, as a folder of Parquet shards.

    Resumable after any kill and idempotent: called again, it goes on behind the last whole shard, or only
        reports.

    Args:
        source: Preference set of any format.
        folder: Where the shards go; made if need be.
        format: A key of `OFFLINE`, or "auto".
        limit, seed: At most this many pairs, chosen by key.
        check: As in `read_votes`; "structure" takes a fraction of the time, and finds about as much damage as
            decoding does (see `check_structure`). The run that encodes the pictures finds what is left.
        shard_pairs: Pairs a shard.
        tick: Called with the pairs of each shard that was filled; it is written while the next is read.
    Returns:
        The report, the same whether the import ran through or was resumed.
    Raises:
        ConfigError, MissingError, ImportFormatError: from reading; ImportFormatError too when no pair is
            left.
        StoreError: the folder holds something else, or the disk is full.
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
        return ImportReport.from_json(_read_json(folder / FINISHED)["report"])
    shards = _whole_shards(folder)
    report, digests = _resumed(folder, shards)
    pairs = read_votes(form, source, report, check=check, limit=limit, seed=seed)
    digests |= _write(folder, pairs, report, len(shards), shard_pairs, tick)
    if report.kept == 0:
        raise ImportFormatError(
            f"{source} gave no pair: {report.describe()}; every such row is in {folder / QUARANTINE}; first "
            f"rows: "
            f"{report.examples[:3]}"
        )
    files = {name: _entry(folder / name, digest) for name, digest in digests.items()}
    files[QUARANTINE] = _entry(folder / QUARANTINE, sha256_of(folder / QUARANTINE))
    _write_json(folder / FINISHED, {"format": FORMAT, "report": report.to_json(), "files": files})
    return report


def _write(
    folder: Path,
    pairs: Iterator[OfflinePair],
    report: ImportReport,
    first: int,
    most: int,
    tick: Callable[[int], None],
) -> dict[str, str]:
    """Write what is left of the pairs as shards from number `first` on, each while the next is read; their
    SHA-256 by name."""
    shards: list[Shard] = []
    try:
        with _quarantine_log(folder, report) as log_length, Behind() as behind:
            while True:
                shards.append(Shard(folder, first + len(shards), behind))
                if not _fill(shards[-1], pairs, most):
                    shards.pop()
                    break
                shards[-1].close({"report": report.to_json(), "quarantine_bytes": log_length()})
                tick(shards[-1].pairs)
            log_length()
    except BaseException:
        for shard in shards:
            shard.discard()
        raise
    return {shard.path.name: shard.sha256 for shard in shards}


def verify_rewritten(folder: str | Path) -> int:
    """Recompute every SHA-256 and row count of an import folder.

    Returns:
        Number of files checked.
    Raises:
        MissingError: the folder is no finished import.
        StoreError: lists every problem.
    """
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


def _fill(shard: Shard, pairs: Iterator[OfflinePair], most: int) -> bool:
    """Fill a shard, or put into it what is left; False when nothing is."""
    for pair in pairs:
        shard.add(pair)
        if shard.pairs >= most or shard.bytes >= SHARD_BYTES:
            break
    return shard.pairs > 0


# ---- state -------------------------------------------------------------------------------------------------


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
            f"now "
            f"{origin[changed[0]]!r}); name a new folder, or give the settings that this one was begun with"
        )


def _whole_shards(folder: Path) -> list[Path]:
    """The shards that were finished, numbered without a gap; what a killed import left of others is
    removed."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()
    shards = sorted(folder.glob("pairs-*.parquet"))
    for number, path in enumerate(shards):
        if path.name != f"pairs-{number:05d}.parquet":
            raise StoreError(
                f"{folder} lacks pairs-{number:05d}.parquet but holds {path.name}; import into a new folder"
            )
    return shards


def _resumed(folder: Path, shards: list[Path]) -> tuple[ImportReport, dict[str, str]]:
    """The counts up to the last whole shard, the log cut back to that moment, and every shard's SHA-256."""
    log = folder / QUARANTINE
    state: dict[str, Any] = {"report": ImportReport().to_json(), "quarantine_bytes": 0}
    if shards:
        try:
            state = json.loads(pq.read_metadata(shards[-1]).metadata[STATE])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{shards[-1]} is damaged ({error}); delete it and import again") from error
    log.touch()
    if log.stat().st_size < state["quarantine_bytes"]:
        raise StoreError(f"{log} is shorter than {shards[-1].name} says; import into a new folder")
    os.truncate(log, state["quarantine_bytes"])
    return ImportReport.from_json(state["report"]), {path.name: sha256_of(path) for path in shards}


@contextmanager
def _quarantine_log(folder: Path, report: ImportReport) -> Iterator[Callable[[], int]]:
    """Appends what the report quarantines; yields a function that makes it durable and tells its length."""
    with open(folder / QUARANTINE, "ab") as file:
        report.log = lambda row, reason, rows: _log_line(file, row, reason, rows)

        def length() -> int:
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

        yield length
        report.log = None


def _log_line(file: Any, row: str, reason: str, rows: int) -> None:
    file.write((json.dumps({"row": row, "reason": reason, "rows": rows}) + "\n").encode())


def _entry(path: Path, digest: str) -> dict[str, object]:
    is_log = path.name == QUARANTINE
    if is_log:
        with open(path, "rb") as file:
            rows = sum(1 for _ in file)
    else:
        rows = pq.read_metadata(path).num_rows
    return {"sha256": digest, "rows": rows, "bytes": path.stat().st_size}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise StoreError(f"{path} has format {body['format']!r}, this version reads {FORMAT}")
        return body
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!r}); import into a new folder") from error


def _write_json(path: Path, body: Mapping[str, object]) -> None:
    write_whole(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
