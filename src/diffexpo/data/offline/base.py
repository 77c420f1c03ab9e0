"""What all importers of preference sets share: votes go in, verified pairs come out, what is dropped is
counted.

    format file --votes()--> Vote (two pictures, a verdict, nothing checked) --read_votes()--> OfflinePair

A vote becomes a pair when somebody won. Ties and unlabelled votes are dropped and counted; votes that cannot
be used are quarantined: counted by reason, the first ones named. Nothing is dropped silently, and one bad row
never ends an import.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal

from PIL import Image

from diffexpo.data.images import FORMATS, decode_image
from diffexpo.data.offline.ahead import map_ahead
from diffexpo.data.offline.structure import MAX_SCANS, check_size, check_structure
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.rng import keyed_seed

Check = Literal["decode", "structure", "none"]
MAX_PICTURE_BYTES = 64 * 1024 * 1024
MAX_CAPTION = 20_000
MAX_RANKED = 64
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_EXAMPLES = 20
_FOOTER = 2**16
_HASHED_WHOLE = 2**26
_LARGE = 2 * 1024 * 1024


@dataclass(frozen=True)
class OfflinePair:
    """One labelled row, winner first. `row` is "file:row number", its name in reports and random numbers."""

    row: str
    caption: str
    winner_jpg: bytes
    loser_jpg: bytes
    winner_model: str | None = None
    loser_model: str | None = None
    winner_uid: str | None = None
    loser_uid: str | None = None
    margin: float | None = None
    confidence: float | None = None


@dataclass
class ImportReport:
    """What became of the rows read: read = kept + ties + unlabelled + sum of quarantined (+ not selected by
    a limit). `sizes` counts the kept pairs by the size they were fitted to, where there were several to
    choose from.
    """

    read: int = 0
    kept: int = 0
    ties: int = 0
    unlabelled: int = 0
    unselected: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    log: Callable[[str, str, int], None] | None = field(default=None, repr=False, compare=False)

    def quarantine(self, row: str, reason: str, count: int = 1) -> None:
        """Count a row that cannot be used, and tell `log` its name, the reason and how many rows it stands
        for."""
        self.quarantined[reason] = self.quarantined.get(reason, 0) + count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{row}: {reason}")
        if self.log is not None:
            self.log(row, reason, count)

    def to_json(self) -> dict[str, Any]:
        """The counts and examples as JSON values."""
        return {
            "read": self.read,
            "kept": self.kept,
            "ties": self.ties,
            "unlabelled": self.unlabelled,
            "unselected": self.unselected,
            "quarantined": dict(self.quarantined),
            "examples": list(self.examples),
            **({"sizes": dict(self.sizes)} if self.sizes else {}),
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> ImportReport:
        """The report that `to_json` was stored from."""
        counts = [int(record[name]) for name in ("read", "kept", "ties", "unlabelled", "unselected")]
        return ImportReport(
            *counts,
            quarantined=dict(record["quarantined"]),
            examples=list(record["examples"]),
            sizes=dict(record.get("sizes", {})),
        )

    def describe(self) -> str:
        """One line for a person."""
        bad = "".join(
            f", {count} quarantined ({reason})" for reason, count in sorted(self.quarantined.items())
        )
        limit = f", {self.unselected} beyond the limit" if self.unselected else ""
        dropped = f"{self.ties} ties, {self.unlabelled} unlabelled{limit}{bad}"
        sizes = ", ".join(f"{count} at {size}" for size, count in sorted(self.sizes.items()))
        fitted = f"; height x width: {sizes}" if sizes else ""
        return f"{self.kept} pairs of {self.read} rows ({dropped}){fitted}"


@dataclass(frozen=True)
class Vote:
    """One comparison as a file holds it; nothing in it has been checked.

    `verdict` is "0" or "1" (which picture won), "tie", "unlabelled", or the reason why the row is unusable.
    `load(side)` reads a picture's bytes and may raise ImportFormatError with a reason. `count` is above 1 for
    a stretch of rows that cannot be read at all.
    """

    row: str
    verdict: str
    caption: object = None
    load: Callable[[int], object] = lambda side: None
    models: tuple[object, object] = (None, None)
    uids: tuple[object, object] = (None, None)
    margin: object = None
    confidence: object = None
    count: int = 1


@dataclass(frozen=True)
class Format:
    """How one kind of preference set is told from others and read.

    `is_like(path)` says whether a file or folder looks like it. `files(path)` lists what is read, for the
    fingerprint, and raises MissingError or ImportFormatError when it cannot be a set of this format.
    `votes(path, start)` yields the votes in a fixed order from number `start` on.
    """

    summary: str
    is_like: Callable[[Path], bool]
    files: Callable[[Path], list[Path]]
    votes: Callable[[Path, int], Iterator[Vote]]


# ---- from votes to pairs -----------------------------------------------------------------------------------


def read_votes(
    form: Format,
    path: Path,
    report: ImportReport,
    *,
    check: Check = "decode",
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[OfflinePair]:
    """The usable pairs of a set, in order, one in memory at a time; goes on behind `report.read`.

    Args:
        form: The set's format.
        path: File or folder.
        report: Counts what happens; complete when the iterator is. A report of an earlier, unfinished reading
            makes this one continue behind it.
        check: What is done to find out that both pictures are whole; a row with one that is not is
            quarantined. "decode": both are decoded; "structure": their files are read without decoding;
            "none": nothing, because the caller decodes anyway.
        limit: Take at most this many labelled rows, chosen by key, not from the front.
        seed: Name of that choice.
    Raises:
        MissingError, ImportFormatError: the set as a whole cannot be read.
    """
    form.files(path)
    selected = None if limit is None else _select(form, path, limit, seed)
    read = (_pair_of(vote, selected) for vote in form.votes(path, report.read))
    verified = map_ahead(_VERIFIERS[check], read, _weight, threads=None if check == "decode" else 1)
    for vote, pair in verified:
        report.read += vote.count
        if isinstance(pair, OfflinePair):
            report.kept += 1
            yield pair
        elif pair:
            report.quarantine(vote.row, pair, vote.count)
        elif vote.verdict == "tie":
            report.ties += vote.count
        elif vote.verdict == "unlabelled":
            report.unlabelled += vote.count
        else:
            report.unselected += 1


_Found = tuple[Vote, OfflinePair | str]
"""A vote and its pair, or why it is none; no reason for votes that are not wrong but no pair either."""


def _pair_of(vote: Vote, selected: frozenset[str] | None) -> _Found:
    # What waits for its turn must not hold the pictures of rows that give no pair: only pairs are weighed.
    bare = Vote(vote.row, vote.verdict, count=vote.count)
    if vote.verdict in ("tie", "unlabelled"):
        return bare, ""
    if vote.verdict not in ("0", "1"):
        return bare, vote.verdict
    if selected is not None and vote.row not in selected:
        return bare, ""
    try:
        return bare, _pair(vote)
    except ImportFormatError as error:
        return bare, str(error)


def _verify(found: _Found, verify: Callable[[bytes], None]) -> _Found:
    vote, pair = found
    try:
        if isinstance(pair, OfflinePair):
            # in the order of the row, so that the reason is that of its first bad picture
            images = (pair.winner_jpg, pair.loser_jpg)
            for data in images if vote.verdict == "0" else reversed(images):
                verify(data)
    except ImportFormatError as error:
        return vote, str(error)
    return found


def _decode(found: _Found) -> _Found:
    return _verify(found, verify_picture)


def _look_at_structure(found: _Found) -> _Found:
    return _verify(found, verify_structure)


def _pass_on(found: _Found) -> _Found:
    return found


_VERIFIERS = {"decode": _decode, "structure": _look_at_structure, "none": _pass_on}


def _weight(found: _Found) -> int:
    """Bytes that wait with a pair for its turn; 0 where there is nothing to do."""
    pair = found[1]
    return len(pair.winner_jpg) + len(pair.loser_jpg) if isinstance(pair, OfflinePair) else 0


def _select(form: Format, path: Path, limit: int, seed: int) -> frozenset[str]:
    named = (vote.row for vote in form.votes(path, 0) if vote.verdict in ("0", "1"))
    keyed = ((keyed_seed(seed, "offline", row), row) for row in named)
    return frozenset(row for _, row in heapq.nsmallest(limit, keyed))


def _pair(vote: Vote) -> OfflinePair:
    winner = int(vote.verdict)
    loser = 1 - winner
    caption = check_caption(vote.caption)
    images = [_bytes(vote.load(side)) for side in (0, 1)]
    if images[0] == images[1]:
        raise ImportFormatError("both images are the same")
    uids = [_text(uid) for uid in vote.uids]
    if uids[0] is not None and uids[0] == uids[1]:
        raise ImportFormatError("two images under one uid")
    return OfflinePair(
        row=vote.row,
        caption=caption,
        winner_jpg=images[winner],
        loser_jpg=images[loser],
        winner_model=_text(vote.models[winner]),
        loser_model=_text(vote.models[loser]),
        winner_uid=uids[winner],
        loser_uid=uids[loser],
        margin=_number(vote.margin),
        confidence=_number(vote.confidence),
    )


def skip_votes(votes: Iterable[Vote], start: int) -> Iterator[Vote]:
    """The votes from number `start` on, for formats that can only be read from the front."""
    number = 0
    for vote in votes:
        if number >= start:
            yield vote
        number += vote.count


def check_caption(caption: object) -> str:
    """The caption without white space around it.

    Raises:
        ImportFormatError: with a reason: no text, not UTF-8, zero bytes, longer than 20,000 characters.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise ImportFormatError("no caption")
    if len(caption) > MAX_CAPTION:
        raise ImportFormatError(f"caption longer than {MAX_CAPTION:,} characters")
    if "\0" in caption:
        raise ImportFormatError("caption holds zero bytes")
    if not is_utf8(caption):
        raise ImportFormatError("text is not UTF-8")
    return caption.strip()


def is_utf8(text: str) -> bool:
    """Whether a text can be written: bytes that were not UTF-8 are read as lone surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes(value: object) -> bytes:
    data = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise ImportFormatError("no bytes")
    if len(data) > MAX_PICTURE_BYTES:
        raise ImportFormatError("picture file larger than 64 MiB")
    return data


def _text(value: object) -> str | None:
    return str(value)[:200] if value and is_utf8(str(value)) else None


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


# ---- verdicts ----------------------------------------------------------------------------------------------


def verdict_of_labels(first: object, second: object) -> str:
    """The verdict of two labels: 1/0, 0/1, or 0.5/0.5 for a tie; both empty is unlabelled."""
    if first in (None, "") and second in (None, ""):
        return "unlabelled"
    known = {(1.0, 0.0): "0", (0.0, 1.0): "1", (0.5, 0.5): "tie"}
    return known.get((_parsed(first), _parsed(second)), "labels are not 1/0, 0/1 or 0.5/0.5")


def verdict_of_record(record: Mapping[str, object]) -> str:
    """The verdict of a row of named values: `label_0` and `label_1`, or `preferred`, or `label`.

    `preferred` is the number of the better picture (0 or 1) or "tie"; `label` is "image_0", "image_1" or
    "tie". A `label` of 0 or 1 is refused, because it means the better picture in some sets and the first
    picture's label in others.
    """
    if "label_0" in record and "label_1" in record:
        return verdict_of_labels(record["label_0"], record["label_1"])
    name = "preferred" if "preferred" in record else "label"
    value = record.get(name)
    if value in (None, ""):
        return "unlabelled"
    known = {"image_0": "0", "image_1": "1", "tie": "tie"}
    if name == "preferred":
        known |= {"0": "0", "1": "1"}
        value = int(value) if isinstance(value, float) and value in (0.0, 1.0) else value
        reason = "preferred is not 0, 1 or tie"
    else:
        reason = "label is not image_0, image_1 or tie; put the better picture's number in `preferred`"
    is_plain = isinstance(value, (str, int)) and not isinstance(value, bool)
    return known.get(str(value).strip(), reason) if is_plain else reason


def votes_of_ranking(
    row: str,
    caption: object,
    ranks: object,
    load: Sequence[Callable[[], object]] | None,
    uids: Sequence[object] | None = None,
) -> Iterator[Vote]:
    """Every two pictures of a ranking as a vote: n pictures give n (n - 1) / 2, equal ranks are ties.

    Args:
        row: Name of the ranking; votes of more than two pictures are named row/i-j.
        caption: Their prompt.
        ranks: One number a picture, smaller is better.
        load: One function a picture that reads its bytes; None when there is no list of pictures.
        uids: One name a picture.
    """
    reason = _ranking_problem(ranks, load)
    if reason:
        yield Vote(row, reason)
        return
    assert isinstance(ranks, (list, tuple)) and load is not None  # what _ranking_problem has checked
    names = uids or [None] * len(load)
    for i in range(len(load)):
        for j in range(i + 1, len(load)):
            verdict = "tie" if ranks[i] == ranks[j] else "0" if ranks[i] < ranks[j] else "1"
            yield Vote(
                row if len(load) == 2 else f"{row}/{i}-{j}",
                verdict,
                caption,
                lambda side, pair=(load[i], load[j]): pair[side](),
                uids=(names[i], names[j]),
            )


def _ranking_problem(ranks: object, load: Sequence[object] | None) -> str:
    if load is None or len(load) < 2:
        return "no list of two pictures or more"
    if len(load) > MAX_RANKED:
        return f"more than {MAX_RANKED} pictures in one ranking"
    if not isinstance(ranks, (list, tuple)) or len(ranks) != len(load):
        return "not one rank a picture"
    if any(_number(rank) is None for rank in ranks):
        return "a rank is not a number"
    return ""


def _parsed(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None


# ---- pictures ----------------------------------------------------------------------------------------------


def verify_picture(data: bytes) -> None:
    """Refuse bytes that are no whole picture. Every byte is decoded, a JPEG at an eighth of its size.

    Raises:
        ImportFormatError: with a reason: "not an image"; "truncated or damaged"; "more than 64 megapixels";
            "more than 16 megapixels in a format that is decoded whole" (all but baseline JPEG); "a JPEG of
            more than 100 scans".
    """
    with _opened(data) as image, nullcontext() if _is_baseline(image) else _one_if_large(image):
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


def verify_structure(data: bytes) -> None:
    """Refuse bytes that are no whole picture, without decoding JPEG and PNG (see `check_structure`); WebP,
    whose structure says nothing of its pixels, is decoded.

    Raises:
        ImportFormatError: the reasons of `verify_picture`.
    """
    if data.startswith(b"RIFF"):
        verify_picture(data)
    else:
        check_structure(data)


@contextmanager
def whole_picture(data: bytes) -> Iterator[Image.Image]:
    """`decode_image` within the limits of `verify_picture`; while a thread uses a large picture, no other
    decodes one.

    Raises:
        ImportFormatError: the reasons of `verify_picture`. What goes wrong in the block is no damage and
            passes as it is.
    """
    with ExitStack() as turn:
        with _opened(data) as image:
            turn.enter_context(_one_if_large(image))
            picture = decode_image(data)
        yield picture


class _Quiet:
    """No warnings while a thread is inside. `warnings.catch_warnings` alone is not made for several threads:
    one that leaves would bring back what another has turned off, or keep it off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._num_inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._caught.__exit__(kind, error, trace)


_QUIET = _Quiet()
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture with its header read and found to fit in memory; what goes wrong in the block is damage."""
    with _QUIET:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImportFormatError("more than 64 megapixels") from error
        except Exception as error:  # decoders raise whatever their parsers stumble over
            raise ImportFormatError("not an image") from error
        with image:
            _check_size(image, data)
            try:
                yield image
            except ImportFormatError:
                raise
            except Exception as error:  # as above
                raise ImportFormatError("truncated or damaged") from error


def _check_size(image: Image.Image, data: bytes) -> None:
    check_size(image.width, image.height, is_baseline=_is_baseline(image))
    # each scan is a pass over the whole picture, so a few kilobytes of them can take hours
    if image.format == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImportFormatError(f"a JPEG of more than {MAX_SCANS} scans")


def _is_baseline(image: Image.Image) -> bool:
    """Whether it is decoded a few lines at a time."""
    return image.format == "JPEG" and not image.info.get("progressive")


def _one_if_large(image: Image.Image) -> AbstractContextManager[object]:
    """No two threads decode large pictures whole at once, which would take much memory."""
    return _ONE_AT_A_TIME if image.width * image.height > _LARGE else nullcontext()


class PictureFolder:
    """Reads pictures that rows name by path; nothing outside the folder is ever opened."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def read(self, name: object, *prefixes: str) -> bytes:
        """Bytes of `root/name`, or of `root/prefix/name` for the first prefix under which it lies.

        Raises:
            ImportFormatError: with a reason: no name, a URL, a path that leaves the folder, no such file, not
                a regular file, larger than 64 MiB.
        """
        if not isinstance(name, str) or not name.strip():
            raise ImportFormatError("no picture is named")
        if "://" in name or name.startswith("data:"):
            raise ImportFormatError("picture is a URL; pictures are never fetched")
        inside = PurePosixPath(name.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or ":" in inside.parts[0] or "\0" in name:
            raise ImportFormatError("picture path leaves the folder")
        for prefix in ("", *prefixes):
            data = self._read(self.root / prefix / inside)
            if data is not None:
                return data
        raise ImportFormatError("picture is missing")

    def _read(self, path: Path) -> bytes | None:
        try:
            real = path.resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, RuntimeError, ValueError) as error:
            raise ImportFormatError("picture cannot be opened") from error
        if not real.is_relative_to(self.root):
            raise ImportFormatError("picture path leaves the folder")
        return read_regular(real, MAX_PICTURE_BYTES)


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; never waits, as a named pipe would make one.

    Raises:
        ImportFormatError: with a reason.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ImportFormatError("picture is not a regular file")
            if found.st_size > most:
                raise ImportFormatError("picture file larger than 64 MiB")
            return file.read(most)
    except (OSError, ValueError) as error:
        raise ImportFormatError("picture cannot be opened") from error


# ---- files -------------------------------------------------------------------------------------------------


def find_files(path: Path, suffixes: Sequence[str], expected: str) -> list[Path]:
    """The regular files a source means, sorted by path: itself, or those below it with one of the suffixes.

    Raises:
        MissingError: there is no such file or folder, or the folder holds none.
        ImportFormatError: one of them is a pipe, a device or a dead link.
    """
    if not os.path.lexists(path):
        raise MissingError(f"offline.source: {path} does not exist; expected {expected}")
    found = [path]
    if path.is_dir():
        found = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(path)
            for name in names
            if Path(name).suffix.lower() in suffixes
        )
    if not found:
        raise MissingError(f"offline.source: {path} holds no {suffixes[0]} file; expected {expected}")
    for file in found:
        if not file.is_file():
            raise ImportFormatError(
                f"{file} is not a regular file (a pipe, a device or a dead link); remove it or name another "
                f"source"
            )
    return found


def has_suffix(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file has one of the suffixes, or a folder holds such a file anywhere below it."""
    if not path.is_dir():
        return path.suffix.lower() in suffixes
    return any(Path(name).suffix.lower() in suffixes for _, _, names in os.walk(path) for name in names)


def row_name(root: Path, file: Path, number: object) -> str:
    """ "file:number", the file relative to the source, so that equal names in two folders stay apart."""
    return printable(f"{file.name if file == root else file.relative_to(root).as_posix()}:{number}")


def printable(text: str) -> str:
    """The text with what cannot be written in UTF-8 as escapes."""
    return text.encode(errors="backslashreplace").decode()


def fingerprint(files: Iterable[Path], root: Path) -> dict[str, str]:
    """What tells one set of files from another, by name: length and SHA-256, of large ones only of their end,
    of pictures the length alone.

    Parquet keeps its index at the end, so that two sets that differ in a row differ there. Beyond 32 files
    the whole list becomes one digest.
    """
    found = {row_name(root, file, "").rstrip(":"): _file_mark(file) for file in files}
    if len(found) <= 32:
        return found
    text = "\n".join(f"{name} {value}" for name, value in found.items())
    return {f"{len(found)} files": hashlib.sha256(text.encode()).hexdigest()[:32]}


def _file_mark(file: Path) -> str:
    if file.suffix.lower() in PICTURE_SUFFIXES:
        return str(file.stat().st_size)
    with open(file, "rb") as stream:
        length = stream.seek(0, 2)
        is_footed = length > _HASHED_WHOLE or file.suffix.lower() in (".parquet", ".tar")
        stream.seek(max(0, length - _FOOTER) if is_footed else 0)
        return f"{length}:{hashlib.file_digest(stream, 'sha256').hexdigest()[:32]}"
