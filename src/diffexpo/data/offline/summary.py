"""What a preference set holds, counted in one pass over it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from statistics import median_low

from diffexpo.bounded.images import opened
from diffexpo.data.offline.formats import AUTO, find_format
from diffexpo.data.offline.votes import ImportReport, OfflinePair, read_votes

_MOST = 10
_KINDS = 1000
_OTHER = "(others)"
_WON = {"0": "the first picture won", "1": "the second picture won"}


def inspect_offline(path: str | Path, *, format: str = AUTO, rows: int = 3) -> dict[str, object]:
    """Format, files and the first `rows` votes of a set, without reading the rest, as
    {"format", "what", "files", "bytes", "first rows": [{"row", "verdict", "prompt", ...}]}."""
    path = Path(path)
    name, form = find_format(format, path)
    files = form.files(path)
    shown = [
        {
            "row": vote.row,
            "verdict": _WON.get(vote.verdict, vote.verdict),
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
    path: str | Path, *, format: str = AUTO, limit: int | None = None, seed: int = 0
) -> dict[str, object]:
    """Everything countable about a set, images decoded as an import would.

    Args:
        path, format, limit, seed: As in `read_offline`.
    Returns:
        Counts of rows, pairs, prompts, models, image formats and sizes. "same pair again" counts pairs
        whose prompt and images came before with the same winner, "contradicting pairs" those with the other
        one.
    """
    path = Path(path)
    name, form = find_format(format, path)
    report = ImportReport()
    counts = _counted(read_votes(form, path, report, limit=limit, seed=seed))
    return {
        "format": name,
        "rows": report.read,
        "pairs": report.kept,
        "ties": report.ties,
        "unlabelled": report.unlabelled,
        "beyond the limit": report.unselected,
        "quarantined": report.quarantined,
        **counts,
    }


def _counted(pairs: Iterable[OfflinePair]) -> dict[str, object]:
    """Counts of pairs, the most frequent first; of prompts and pairs only eight-byte hashes are kept."""
    prompts: Counter[bytes] = Counter()
    characters: Counter[int] = Counter()
    winners: dict[bytes, bytes] = {}
    repeats: Counter[bool] = Counter()  # whether the same image won
    names = ("winner models", "loser models", "picture formats", "picture sizes")
    named: dict[str, Counter[str]] = {name: Counter() for name in names}
    num_bytes = 0
    for pair in pairs:
        caption, images = pair.caption.encode(), (pair.winner_jpg, pair.loser_jpg)
        prompts[_digest(caption)] += 1
        characters[min(len(pair.caption), _KINDS)] += 1
        num_bytes += pair.bytes
        winner, loser = map(_digest, images)
        key = _digest(caption, *sorted((winner, loser)))
        if key in winners:
            repeats[winners[key] == winner] += 1
        winners.setdefault(key, winner)
        found = [("winner models", pair.winner_model), ("loser models", pair.loser_model)]
        for data in images:
            with opened(data) as image:
                found += [
                    ("picture formats", image.format),
                    ("picture sizes", f"{image.width}x{image.height}"),
                ]
        for what, value in found:
            name, counter = value or "(not said)", named[what]
            counter[name if name in counter or len(counter) < _KINDS else _OTHER] += 1
    return {
        "prompts": len(prompts),
        "most pairs of one prompt": max(prompts.values(), default=0),
        "prompt characters (median)": median_low(characters.elements()) if characters else 0,
        "same pair again": repeats[True],
        "contradicting pairs": repeats[False],
        **{name: dict(counter.most_common(_MOST)) for name, counter in named.items()},
        "mean picture bytes": num_bytes // max(1, 2 * prompts.total()),
    }


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
