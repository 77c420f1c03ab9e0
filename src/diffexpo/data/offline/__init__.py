"""Importers of offline preference sets, one a format. `pickapic` reads without torch; `ingest` encodes into
a store.
"""

from diffexpo.data.offline.pickapic import ImportReport, OfflinePair, read_pickapic

__all__ = ["ImportReport", "OfflinePair", "read_pickapic"]
