"""Which formats of preference sets there are, how one is recognised, and how any of them is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from diffexpo.data.offline.folders import FOLDERS
from diffexpo.data.offline.hpd import HPDV2, HPDV3
from diffexpo.data.offline.imagerewarddb import IMAGEREWARDDB
from diffexpo.data.offline.pickapic import EXPORTED, PICKAPIC
from diffexpo.data.offline.tables import TABLE
from diffexpo.data.offline.votes import Check, Format, ImportReport, OfflinePair, read_votes
from diffexpo.data.offline.webdataset import WEBDATASET
from diffexpo.errors import ConfigError, ImportFormatError, MissingError

AUTO = "auto"

# Asked in this order, the most particular first: any Parquet that nothing else claims is meant as Pick-a-Pic.
OFFLINE: dict[str, Format] = {
    "diffexpo": EXPORTED,
    "imagerewarddb": IMAGEREWARDDB,
    "hpdv3": HPDV3,
    "hpdv2": HPDV2,
    "folders": FOLDERS,
    "table": TABLE,
    "pickapic": PICKAPIC,
    "webdataset": WEBDATASET,
}


def detect_format(path: str | Path) -> str:
    """Name of the format that a file or folder looks like; what looks like none is an ImportFormatError."""
    path = Path(path)
    if not os.path.lexists(path):
        raise MissingError(f"offline.source: {path} does not exist; expected a preference set")
    if path.is_dir() and (path / "manifests").is_dir():
        raise ImportFormatError(
            f"{path} is the store of a run, which holds latents, not images; export its pairs first with "
            "`diffexpo data export`"
        )
    for name, form in OFFLINE.items():
        if form.is_like(path):
            return name
    known = "\n".join(f"  {name:14} {form.summary}" for name, form in OFFLINE.items())
    raise ImportFormatError(
        f"{path} looks like no preference set that can be read; name the file that lists the pairs, or the "
        f"format with offline.format (--format). Formats:\n{known}"
    )


def find_format(name: str, path: str | Path) -> tuple[str, Format]:
    """The named format, or with "auto" the one that the source looks like; no such name is a ConfigError."""
    if name == AUTO:
        name = detect_format(path)
    if name not in OFFLINE:
        raise ConfigError(f"offline.format = {name!r}: expected {AUTO} or one of {', '.join(OFFLINE)}")
    return name, OFFLINE[name]


def read_offline(
    path: str | Path,
    report: ImportReport | None = None,
    *,
    format: str = AUTO,
    check_images: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[OfflinePair]:
    """The usable pairs of a preference set of any format, in order, a few rows in memory at a time.

    Args:
        path: File or folder.
        report: Counts what happens; complete when the iterator is.
        format: A key of `OFFLINE`, or "auto".
        check_images: Decode both images and quarantine the row if one is none.
        limit: Take at most this many labelled rows, chosen by key.
        seed: Name of that choice.
    Raises:
        ConfigError, MissingError, ImportFormatError: the set as a whole cannot be read.
    """
    form = find_format(format, path)[1]
    check: Check = "decode" if check_images else "none"
    yield from read_votes(form, Path(path), report or ImportReport(), check=check, limit=limit, seed=seed)


read_pickapic = partial(read_offline, format="pickapic")
"""`read_offline` of Parquet in the Pick-a-Pic columns: a `.parquet` file, or a folder that holds some."""
