"""Importers of offline preference sets, one file per format.

votes          votes to verified pairs, what is dropped, and the contract of a format
sources        the files and images of a set, found and read within limits
reading        rows of Parquet, CSV and JSON, a few in memory at a time
image_files    whether an image's file is whole
formats        which formats there are and how one is recognised
writing        any set as Parquet shards in the Pick-a-Pic v2 columns, without a model
summary        what a set holds
ingest         any set into a run's store, every image encoded once (the torch side)
"""

from diffexpo.data.offline.formats import OFFLINE, detect_format, read_offline, read_pickapic
from diffexpo.data.offline.votes import ImportReport, OfflinePair
from diffexpo.data.offline.writing import rewrite_pairs, verify_rewritten

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
