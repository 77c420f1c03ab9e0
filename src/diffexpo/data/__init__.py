"""Prompts, pairs and the store of a run. Loads without torch; `pairs`, `scored`, `latents` and
`offline.ingest` are the torch side.
"""

from diffexpo.data.export import export_pairs
from diffexpo.data.offline import ImportReport, OfflinePair, read_pickapic
from diffexpo.data.prompts import PromptReport, filter_long, load_prompts, read_prompts
from diffexpo.data.store import Store

__all__ = [
    "ImportReport",
    "OfflinePair",
    "PromptReport",
    "Store",
    "export_pairs",
    "filter_long",
    "load_prompts",
    "read_pickapic",
    "read_prompts",
]
