"""What a preference set holds, counted in one pass over it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from PIL import Image

from diffexpo.data.offline.base import ImportReport, OfflinePair, read_votes
from diffexpo.data.offline.formats import AUTO, find_format

_MOST = 10
_KINDS = 1000
_OTHER = "(others)"


def inspect_offline(path: str | Path, *, format: str = AUTO, rows: int = 3) -> dict[str, object]:
    """Format, files and first votes of a set, without reading the rest.

    Args:
        path: File or folder.
        format: A key of `OFFLINE`, or "auto".
        rows: How many votes to show.
    Returns:
        {"format", "what", "files", "bytes", "first rows": [{"row", "verdict", "prompt", ...}]}.
    Raises:
        ConfigError, MissingError, ImportFormatError: the set as a whole cannot be read.
    """
    path = Path(path)
    name, form = find_format(format, path)
    files = form.files(path)
    shown = [
        {
            "row": vote.row,
            "verdict": {"0": "the first picture won", "1": "the second picture won"}.get(
                vote.verdict, vote.verdict
            ),
            "prompt": str(vote.caption)[:200] if vote.caption else None,
            "models": [str(model) for model in vote.models if model],
        }
        for vote in islice(form.votes(path, 0), rows)
    ]
    return {
        "format": name,
        "what": form.summary,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "first rows": shown,
    }


def summarise_offline(
    path: str | Path,
    *,
    format: str = AUTO,
    limit: int | None = None,
    seed: int = 0,
    tick: Callable[[int], None] = lambda pairs: None,
) -> dict[str, object]:
    """Everything countable about a set, pictures decoded as an import would.

    Args:
        path: File or folder.
        format: A key of `OFFLINE`, or "auto".
        limit, seed: At most this many pairs, chosen by key.
        tick: Called after each pair with 1.
    Returns:
        Counts of rows, pairs, prompts, models, picture formats and sizes. "same pair again" counts pairs
        whose prompt and pictures came before with the same winner, "contradicting pairs" those with the other
        one.
    Raises:
        ConfigError, MissingError, ImportFormatError: the set as a whole cannot be read.
    """
    path = Path(path)
    name, form = find_format(format, path)
    report, counts = ImportReport(), _Counts()
    for pair in read_votes(form, path, report, limit=limit, seed=seed):
        counts.add(pair)
        tick(1)
    return {
        "format": name,
        "rows": report.read,
        "pairs": report.kept,
        "ties": report.ties,
        "unlabelled": report.unlabelled,
        "beyond the limit": report.unselected,
        "quarantined": dict(report.quarantined),
        **counts.summary(),
    }


class _Counts:
    """Running counts; of prompts and pairs only eight-byte hashes are kept."""

    def __init__(self) -> None:
        self.prompts: Counter[bytes] = Counter()
        self.pairs: dict[bytes, bytes] = {}
        self.again = self.contradicting = 0
        self.characters: Counter[int] = Counter()
        self.models: dict[str, Counter[str]] = {"winner": Counter(), "loser": Counter()}
        self.formats: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.bytes = 0

    def add(self, pair: OfflinePair) -> None:
        """Count one pair."""
        self.prompts[_digest(pair.caption.encode())] += 1
        self.characters[min(len(pair.caption), _KINDS)] += 1
        pictures = [_digest(data) for data in (pair.winner_jpg, pair.loser_jpg)]
        key = _digest(pair.caption.encode(), *sorted(pictures))
        if key not in self.pairs:
            self.pairs[key] = pictures[0]
        elif self.pairs[key] == pictures[0]:
            self.again += 1
        else:
            self.contradicting += 1
        for role, model in (("winner", pair.winner_model), ("loser", pair.loser_model)):
            _count(self.models[role], model or "(not said)")
        for data in (pair.winner_jpg, pair.loser_jpg):
            self.bytes += len(data)
            with Image.open(io.BytesIO(data)) as image:
                _count(self.formats, str(image.format))
                _count(self.sizes, f"{image.width}x{image.height}")

    def summary(self) -> dict[str, object]:
        """The counts, the most frequent first."""
        total = sum(self.prompts.values())
        return {
            "prompts": len(self.prompts),
            "most pairs of one prompt": max(self.prompts.values(), default=0),
            "prompt characters (median)": _median(self.characters),
            "same pair again": self.again,
            "contradicting pairs": self.contradicting,
            "winner models": dict(self.models["winner"].most_common(_MOST)),
            "loser models": dict(self.models["loser"].most_common(_MOST)),
            "picture formats": dict(self.formats.most_common(_MOST)),
            "picture sizes": dict(self.sizes.most_common(_MOST)),
            "mean picture bytes": self.bytes // max(1, 2 * total),
        }


def _count(counter: Counter[str], name: str) -> None:
    counter[name if name in counter or len(counter) < _KINDS else _OTHER] += 1


def _median(counter: Counter[int]) -> int:
    half, passed = sum(counter.values()) / 2, 0
    for value, count in sorted(counter.items()):
        passed += count
        if passed >= half:
            return value
    return 0


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
