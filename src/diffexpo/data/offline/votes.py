"""What all importers of preference sets share: votes go in, pairs come out, and what is dropped is counted.

    format file --votes()--> Vote (two images and a verdict, unchecked) --read_votes()--> OfflinePair

A vote becomes a pair when somebody won. Ties and unlabelled votes are dropped and counted; votes that cannot
be used are quarantined: counted by reason, the first ones named. One bad row never ends an import.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import IO, Any, Literal

from diffexpo.bounded.images import MAX_IMAGE_BYTES, verify_image, verify_structure
from diffexpo.data.offline.ahead import map_ahead
from diffexpo.data.offline.cells import is_empty, number_of, text_of_id
from diffexpo.data.offline.reading import Damage, Record, column_names, parquet_length, read_rows
from diffexpo.data.offline.sources import printable, row_name
from diffexpo.data.rows import is_utf8
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.rng import keyed_seed

Check = Literal["decode", "structure", "none"]
MAX_CAPTION = 20_000
MAX_RANKED = 64
_EXAMPLES = 20


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

    @property
    def bytes(self) -> int:
        """Bytes of both images."""
        return len(self.winner_jpg) + len(self.loser_jpg)


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
    log: IO[bytes] | None = field(default=None, repr=False, compare=False)

    def quarantine(self, row: str, reason: str, count: int = 1) -> None:
        """Count rows that cannot be used; their name, the reason and how many they are go to `log`."""
        self.quarantined[reason] = self.quarantined.get(reason, 0) + count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{row}: {reason}")
        if self.log is not None:
            self.log.write((json.dumps({"row": row, "reason": reason, "rows": count}) + "\n").encode())

    def to_json(self) -> dict[str, Any]:
        """The counts and examples as JSON values, from which `ImportReport(**values)` is made again."""
        found = asdict(replace(self, log=None))
        return {name: value for name, value in found.items() if name not in ("log", "sizes") or value}

    def describe(self) -> str:
        """One line for a person."""
        dropped = [f"{self.ties} ties", f"{self.unlabelled} unlabelled"]
        dropped += [f"{self.unselected} beyond the limit"] if self.unselected else []
        dropped += [f"{count} quarantined ({reason})" for reason, count in sorted(self.quarantined.items())]
        sizes = ", ".join(f"{count} at {size}" for size, count in sorted(self.sizes.items()))
        fitted = f"; height x width: {sizes}" if sizes else ""
        return f"{self.kept} pairs of {self.read} rows ({', '.join(dropped)}){fitted}"


@dataclass(frozen=True)
class Vote:
    """One comparison as a file holds it; nothing in it has been checked.

    `verdict` is "0" or "1" (which image won), "tie", "unlabelled", or the reason why the row is unusable.
    `load(side)` reads an image's bytes and may raise ImportFormatError with a reason. `count` is above 1 for
    consecutive rows that cannot be read at all.
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


def skip_votes(votes: Iterable[Vote], start: int) -> Iterator[Vote]:
    """The votes from number `start` on, where all have to be read from the first."""
    number = 0
    for vote in votes:
        if number >= start:
            yield vote
        number += vote.count


# ---- formats of rows ---------------------------------------------------------------------------------------


Layout = tuple[Sequence[str], Callable[[str, Record], Iterable[Vote]]]
"""How one file of rows is read: its columns (of Parquet), and votes(row name, row), which raises
ImportFormatError with the reason why a row is unusable."""

Rows = Callable[[Path, Sequence[str], int], Iterator[tuple[object, Any]]]


def row_format(
    summary: str,
    is_like: Callable[[Path], bool],
    find: Callable[[Path], list[Path]],
    layout: Callable[[Path], Layout],
    *,
    rows: Rows = read_rows,
    is_vote_a_row: bool = False,
) -> Format:
    """A format of files whose rows are votes.

    Args:
        summary, is_like: As in `Format`.
        find: The files of a source; raises MissingError where there are none.
        layout: How a file is read; raises ImportFormatError for one that is not of this format.
        rows: (number, row) of a file's rows from a number on; a row is a dict, or `Damage`.
        is_vote_a_row: Every row is one vote, so that a reading that goes on can pass over whole row groups.
    """

    def files(path: Path) -> list[Path]:
        found = find(path)
        for file in found:
            layout(file)
        return found

    def votes(path: Path, start: int) -> Iterator[Vote]:
        passed = 0
        for file in find(path):
            columns, votes_of = layout(file)
            first = 0
            if is_vote_a_row and file.suffix.lower() == ".parquet":
                first = min(start - passed, parquet_length(file)) if start > passed else 0
                passed += first
            prefix = row_name(path, file, "")
            try:
                for number, row in rows(file, columns, first):
                    for vote in _votes_of(row, prefix + printable(str(number)), votes_of):
                        if passed >= start:
                            yield vote
                        passed += vote.count
            except OSError as error:
                raise ImportFormatError(f"{file} cannot be read ({error}); get it again") from error

    return Format(summary, is_like, files, votes)


def _votes_of(row: Any, name: str, votes: Callable[[str, Record], Iterable[Vote]]) -> Iterator[Vote]:
    if not isinstance(row, dict):
        damage = row if isinstance(row, Damage) else Damage("not a JSON object")
        yield Vote(name, damage.reason, count=damage.count)
        return
    try:
        yield from votes(name, row)
    except ImportFormatError as error:
        yield Vote(name, str(error))


def has_columns(
    index: Callable[[Path], Path], suffixes: Sequence[str], *alternatives: Sequence[str]
) -> Callable[[Path], bool]:
    """A test whether the file that `index` finds in a source has all columns of one of the alternatives."""

    def is_like(path: Path) -> bool:
        try:
            file = index(path)
            names = set(column_names(file)) if file.suffix.lower() in suffixes else set()
        except (ImportFormatError, MissingError, OSError):
            return False
        return any(names.issuperset(columns) for columns in alternatives)

    return is_like


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
    """The usable pairs of a set, in order, one in memory at a time.

    Args:
        report: Counts what happens; complete when the iterator is. A report of an earlier, unfinished reading
            makes this one continue after its last row.
        check: How both images are found to be whole; a row with one that is not is quarantined. "decode":
            both are decoded; "structure": see `verify_structure`; "none": the caller decodes anyway.
        limit, seed: At most this many labelled rows, chosen by key, not from the front.
    Raises:
        MissingError, ImportFormatError: the set as a whole cannot be read.
    """
    form.files(path)
    selected = None
    if limit is not None:
        named = (vote.row for vote in form.votes(path, 0) if vote.verdict in ("0", "1"))
        selected = frozenset(heapq.nsmallest(limit, named, key=lambda row: keyed_seed(seed, "offline", row)))
    read = (_pair_of(vote, selected) for vote in form.votes(path, report.read))
    verify = partial(_verified, verify=_VERIFIERS[check])
    # what waits for its turn is a pair's bytes; nothing has to be done for what is no pair
    weight = lambda found: found[1].bytes if isinstance(found[1], OfflinePair) else 0
    for vote, pair in map_ahead(verify, read, weight, threads=None if check == "decode" else 1):
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
    # what waits for its turn must not hold the images of rows that give no pair: only pairs are weighed
    bare = Vote(vote.row, vote.verdict, count=vote.count)
    if vote.verdict not in ("0", "1"):
        return bare, "" if vote.verdict in ("tie", "unlabelled") else vote.verdict
    if selected is not None and vote.row not in selected:
        return bare, ""
    try:
        return bare, _pair(vote)
    except ImportFormatError as error:
        return bare, str(error)


_VERIFIERS: dict[str, Callable[[bytes], None]] = {
    "decode": verify_image,
    "structure": verify_structure,
    "none": lambda data: None,
}


def _verified(found: _Found, verify: Callable[[bytes], None]) -> _Found:
    vote, pair = found
    if isinstance(pair, OfflinePair):
        # in the order of the row, so that the reason is that of its first bad image
        images = (pair.winner_jpg, pair.loser_jpg)
        try:
            for data in images if vote.verdict == "0" else reversed(images):
                verify(data)
        except ImportFormatError as error:
            return vote, str(error)
    return found


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
        margin=number_of(vote.margin),
        confidence=number_of(vote.confidence),
    )


def check_caption(caption: object) -> str:
    """The caption without white space around it; an ImportFormatError says why it cannot be used."""
    if not isinstance(caption, str) or not caption.strip():
        raise ImportFormatError("no caption")
    if len(caption) > MAX_CAPTION:
        raise ImportFormatError(f"caption longer than {MAX_CAPTION:,} characters")
    if "\0" in caption:
        raise ImportFormatError("caption holds zero bytes")
    if not is_utf8(caption):
        raise ImportFormatError("text is not UTF-8")
    return caption.strip()


def _bytes(value: object) -> bytes:
    data = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise ImportFormatError("no bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise ImportFormatError("picture is larger than 64 MiB")
    return data


def _text(value: object) -> str | None:
    text = text_of_id(value)
    return text[:200] if text is not None and is_utf8(text) else None


# ---- verdicts ----------------------------------------------------------------------------------------------


def verdict_of_labels(first: object, second: object) -> str:
    """The verdict of two labels: 1/0, 0/1, or 0.5/0.5 for a tie; both empty is unlabelled."""
    if is_empty(first) and is_empty(second):
        return "unlabelled"
    known: dict[tuple[float | None, ...], str] = {(1.0, 0.0): "0", (0.0, 1.0): "1", (0.5, 0.5): "tie"}
    return known.get((number_of(first), number_of(second)), "labels are not 1/0, 0/1 or 0.5/0.5")


def verdict_of_record(record: Mapping[str, object]) -> str:
    """The verdict of a row of named values: `label_0` and `label_1`, or `preferred`, or `label`.

    `preferred` is the number of the better image (0 or 1) or "tie"; `label` is "image_0", "image_1" or
    "tie". A `label` of 0 or 1 is refused, because it means the better image in some sets and the first
    image's label in others.
    """
    if "label_0" in record and "label_1" in record:
        return verdict_of_labels(record["label_0"], record["label_1"])
    name = "preferred" if "preferred" in record else "label"
    value = record.get(name)
    if is_empty(value):
        return "unlabelled"
    known = {"image_0": "0", "image_1": "1", "tie": "tie"}
    if isinstance(value, str) and (verdict := known.get(value.strip().lower())) is not None:
        return verdict
    if name == "label":
        return "label is not image_0, image_1 or tie; put the better picture's number in `preferred`"
    number = None if isinstance(value, bool) else number_of(value)
    return {0.0: "0", 1.0: "1"}.get(-1.0 if number is None else number, "preferred is not 0, 1 or tie")


def votes_of_ranking(
    row: str, caption: object, ranks: object, paths: object, read: Callable[[object], bytes]
) -> Iterator[Vote]:
    """Every two images of a ranking as a vote: n images give n (n - 1) / 2, equal ranks are ties.

    `ranks` should be one number for each image, smaller is better, and `paths` their paths and uids; neither
    has been checked. Votes of more than two images are named row/i-j.
    """

    def load_of(pair: tuple[object, object]) -> Callable[[int], bytes]:
        return lambda side: read(pair[side])

    if not isinstance(paths, list) or len(paths) < 2:
        raise ImportFormatError("no list of two pictures or more")
    if len(paths) > MAX_RANKED:
        raise ImportFormatError(f"more than {MAX_RANKED} pictures in one ranking")
    if not isinstance(ranks, list) or len(ranks) != len(paths):
        raise ImportFormatError("not one rank a picture")
    places = [place for rank in ranks if (place := number_of(rank)) is not None]
    if len(places) != len(ranks):
        raise ImportFormatError("a rank is not a number")
    for i, j in combinations(range(len(paths)), 2):
        verdict = "tie" if places[i] == places[j] else "0" if places[i] < places[j] else "1"
        name = row if len(paths) == 2 else f"{row}/{i}-{j}"
        pair = (paths[i], paths[j])
        yield Vote(name, verdict, caption, load_of(pair), uids=pair)
