"""Any preference set as Parquet shards in the Pick-a-Pic v2 columns: verified pairs, no model needed.

    FOLDER/import.json             what is imported: written first
    FOLDER/pairs-00000.parquet     2,048 pairs or 64 MiB a shard, whichever comes first
    FOLDER/quarantine.jsonl        one line a row that could not be used: {"row", "reason", "rows"}
    FOLDER/manifest.json           counts, SHA-256 and rows of every file: written last, means complete

Each shard carries, in its Parquet metadata, the counts up to its last pair and the length of quarantine.jsonl at that
moment. A killed import goes on behind the last whole shard, so no pair is lost and none comes twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.data.export import EXPORT_SCHEMA, SCHEMA_VERSION
from diffexpo.data.files import TEMPORARY, sha256_of, whole_file, write_whole
from diffexpo.data.offline.base import Check, ImportReport, OfflinePair, fingerprint, read_votes
from diffexpo.data.offline.exported import FINISHED, STARTED
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.errors import ImportFormatError, MissingError, StoreError
from diffexpo.rng import keyed_choice

SHARD_PAIRS = 2048
SHARD_BYTES = 64 * 1024 * 1024
QUARANTINE = "quarantine.jsonl"
FORMAT = 1
_GROUP_BYTES = 8 * 1024 * 1024
_GROUP_PAIRS = 256
_STATE = b"diffexpo_import"
_PICTURES = ("jpg_0", "jpg_1")
_OURS = ("pair_id", "reward_margin", "source", "confidence", "schema_version")
_GIVEN = (
    "are_different", "best_image_uid", "caption", "has_label", "pair_id", "reward_margin", "source", "confidence",
    "schema_version", "jpg_0", "jpg_1", "label_0", "label_1", "model_0", "model_1", "image_0_uid", "image_1_uid",
)  # fmt: skip
Row = tuple[Any, ...]
SCHEMA = pa.schema([*list(EXPORT_SCHEMA)[:19], *(EXPORT_SCHEMA.field(name) for name in _OURS)])
"""The 19 columns of Pick-a-Pic v2 in its order, then ours."""


def rewrite_pairs(
    source: str | Path,
    folder: str | Path,
    *,
    format: str = AUTO,
    limit: int | None = None,
    seed: int = 0,
    check: Check = "decode",
    shard_pairs: int = SHARD_PAIRS,
    tick: Callable[[int], None] = lambda pairs: None,
) -> ImportReport:
    """Write the usable pairs of a set, their pictures verified, as a folder of Parquet shards.

    Resumable after any kill and idempotent: called again, it goes on behind the last whole shard, or only reports.

    Args:
        source: Preference set of any format.
        folder: Where the shards go; made if need be.
        format: A key of `OFFLINE`, or "auto".
        limit, seed: At most this many pairs, chosen by key.
        check: As in `read_votes`; "structure" is many times faster on large pictures and leaves damage within compressed pixels to the
            run that encodes them.
        shard_pairs: Pairs a shard.
        tick: Called after each shard with the pairs that it added.
    Returns:
        The report, the same whether the import ran through or was resumed.
    Raises:
        ConfigError, MissingError, ImportFormatError: from reading; ImportFormatError too when no pair is left.
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
    with _quarantine_log(folder, report) as log_length:
        pairs = read_votes(form, source, report, check=check, limit=limit, seed=seed)
        while shard := _write_shard(folder, len(digests), pairs, shard_pairs):
            digests[shard.path.name] = shard.close(report, log_length())
            tick(shard.pairs)
        log_length()
    if report.kept == 0:
        raise ImportFormatError(
            f"{source} gave no pair: {report.describe()}; every such row is in {folder / QUARANTINE}; first rows: "
            f"{report.examples[:3]}"
        )
    files = {name: _entry(folder / name, digest) for name, digest in digests.items()}
    files[QUARANTINE] = _entry(folder / QUARANTINE, sha256_of(folder / QUARANTINE))
    _write_json(folder / FINISHED, {"format": FORMAT, "report": report.to_json(), "files": files})
    return report


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


# ---- one shard ---------------------------------------------------------------------------------------------


def _write_shard(folder: Path, number: int, pairs: Iterator[OfflinePair], most: int) -> _Shard | None:
    """The next shard, full or with what is left; None when nothing is."""
    shard = _Shard(folder, number)
    try:
        for pair in pairs:
            shard.add(pair)
            if shard.pairs >= most or shard.bytes >= SHARD_BYTES:
                break
    except BaseException:
        shard.discard()
        raise
    return shard if shard.pairs else None


class _Shard:
    """One Parquet file in the making; nothing of it is visible until `close`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"pairs-{number:05d}.parquet"
        self.pairs = 0
        self.bytes = 0
        self._rows: list[Row] = []
        self._group_bytes = 0
        self._file: _HashedFile | None = None
        self._writer: pq.ParquetWriter | None = None

    def add(self, pair: OfflinePair) -> None:
        """Take in a pair; a full row group goes to the disk."""
        self._rows.append(_row(pair))
        size = len(pair.winner_jpg) + len(pair.loser_jpg)
        self.pairs, self.bytes, self._group_bytes = (
            self.pairs + 1,
            self.bytes + size,
            self._group_bytes + size,
        )
        if len(self._rows) >= _GROUP_PAIRS or self._group_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self, report: ImportReport, log_length: int) -> str:
        """Make the file appear whole; returns its SHA-256."""
        try:
            return self._close(report, log_length)
        except BaseException:
            self.discard()
            raise

    def _close(self, report: ImportReport, log_length: int) -> str:
        self._flush()
        assert self._writer is not None and self._file is not None  # _flush has opened them
        state = {"report": report.to_json(), "quarantine_bytes": log_length}
        self._writer.add_key_value_metadata({_STATE: json.dumps(state).encode()})
        with _refusal(self.path):
            self._writer.close()
            self._file.close()
        with whole_file(self.path) as temporary:
            assert temporary == self._file.path
        return self._file.sha256

    def discard(self) -> None:
        """Give up: what was written is removed."""
        if self._writer is not None:
            with suppress(OSError, pa.ArrowException):
                self._writer.close()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        with _refusal(self.path):
            self._write_rows()

    def _write_rows(self) -> None:
        if self._writer is None:
            self._file = _HashedFile(self.path.with_name(self.path.name + TEMPORARY))
            self._writer = pq.ParquetWriter(
                self._file,
                SCHEMA,
                # pictures are compressed already, and each differs from the others
                compression={name: "none" if name in _PICTURES else "zstd" for name in SCHEMA.names},
                use_dictionary=[name for name in SCHEMA.names if name not in _PICTURES],
                write_statistics=False,
                write_page_checksum=True,
            )
        if self._rows:
            given = dict(zip(_GIVEN, zip(*self._rows, strict=True), strict=True))
            columns = [
                pa.array(given[field.name], field.type)
                if field.name in given
                else pa.nulls(len(self._rows), field.type)
                for field in SCHEMA
            ]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._rows, self._group_bytes = [], 0


@contextmanager
def _refusal(path: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one clear error."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"could not write {path}: {error.strerror or error}. Whole shards are kept: free space and repeat the import."
        ) from error


class _HashedFile:
    """A file that knows the SHA-256 of what was written to it, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it
        self._digest = hashlib.sha256()

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _row(pair: OfflinePair) -> Row:
    """The values of `_GIVEN`."""
    # a winner that always stood first would teach a reader of the file the position
    winner = keyed_choice(2, "import", pair.row)
    pictures = (pair.loser_jpg, pair.winner_jpg)
    models = (pair.loser_model, pair.winner_model)
    uids = (pair.loser_uid, pair.winner_uid)
    first, second = (0, 1) if winner else (1, 0)
    return (
        True, pair.winner_uid, pair.caption, True, pair.row, pair.margin, "offline", pair.confidence, SCHEMA_VERSION,
        pictures[first], pictures[second], float(first), float(second), models[first], models[second], uids[first], uids[second],
    )  # fmt: skip


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
            f"{folder} holds another import: {', '.join(changed)} differ (there {known.get(changed[0])!r}, now "
            f"{origin[changed[0]]!r}); name a new folder"
        )


def _whole_shards(folder: Path) -> list[Path]:
    """The shards that were finished, numbered without a gap; what a killed import left of others is removed."""
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
            state = json.loads(pq.read_metadata(shards[-1]).metadata[_STATE])
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
