"""Sets that this package wrote: `diffexpo data export` and `diffexpo data import` write the Pick-a-Pic
columns."""

from __future__ import annotations

from pathlib import Path

from diffexpo.data.export import SCHEMA_VERSION
from diffexpo.data.offline import pickapic
from diffexpo.data.offline.base import Format, find_files, has_suffix
from diffexpo.data.offline.reading import parquet_rows, parquet_schema
from diffexpo.errors import ImportFormatError

MARK = ("pair_id", "schema_version", "jpg_0")
STARTED, FINISHED = "import.json", "manifest.json"


def is_exported(path: Path) -> bool:
    """Whether the first Parquet file has the columns that only our own sets have, or an import has begun
    here."""
    if path.is_dir() and (path / STARTED).is_file():
        return True
    if not has_suffix(path, (".parquet",)):
        return False
    try:
        names = parquet_schema(find_files(path, (".parquet",), "")[0]).names
    except ImportFormatError:
        return False
    return all(name in names for name in MARK)


def check_files(path: Path) -> list[Path]:
    """The Parquet files of a set that is whole and of a version that this one reads.

    Raises:
        MissingError, ImportFormatError: as `read_pickapic`; an import that was not finished; a newer version.
    """
    if path.is_dir() and (path / STARTED).is_file() and not (path / FINISHED).is_file():
        raise ImportFormatError(
            f"{path} is an import that was not finished; repeat its `diffexpo data import` command to go on"
        )
    files = pickapic.check_files(path)
    for file in files:
        for _, row in parquet_rows(file, ("schema_version",)):
            version = row.get("schema_version") if isinstance(row, dict) else None
            if version is not None and (not isinstance(version, int) or version > SCHEMA_VERSION):
                raise ImportFormatError(
                    f"{file} has schema_version {version!r}, this version reads {SCHEMA_VERSION}; use the "
                    f"version "
                    "that wrote it"
                )
            break
    return files


EXPORTED = Format(
    summary="what `diffexpo data export` and `diffexpo data import` write",
    is_like=is_exported,
    files=check_files,
    votes=pickapic.votes,
)
