"""Importers of offline preference sets, one format a file.

base           votes to verified pairs, what is dropped, pictures from foreign bytes and paths
reading        rows of Parquet, CSV and JSON, a few in memory at a time
formats        which formats there are and how one is recognised
rewrite        any set as Parquet shards in the Pick-a-Pic v2 columns, without a model
summary        what a set holds
ingest         any set into a run's store, every picture encoded once (the torch side)
"""

from diffexpo.data.offline.base import ImportReport, OfflinePair
from diffexpo.data.offline.formats import OFFLINE, detect_format, read_offline
from diffexpo.data.offline.pickapic import read_pickapic
from diffexpo.data.offline.rewrite import rewrite_pairs, verify_rewritten

__all__ = [
    "OFFLINE",
    "ImportReport",
    "OfflinePair",
    "detect_format",
    "read_offline",
    "read_pickapic",
    "rewrite_pairs",
    "verify_rewritten",
]
