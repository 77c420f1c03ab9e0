"""Prompts, pairs and the store of a run. Loads without torch; `pairs`, `scored`, `latents` and
`offline.ingest` are the torch side.
"""

from diffexpo.data.export import export_pairs
from diffexpo.data.offline.formats import OFFLINE, read_offline, read_pickapic
from diffexpo.data.offline.votes import ImportReport, OfflinePair
from diffexpo.data.offline.writing import rewrite_pairs, verify_rewritten
from diffexpo.data.prompt_lists import PROMPT_LISTS, read_prompt_list, split_prompts, write_prompts
from diffexpo.data.prompts import PromptReport, filter_long, load_prompts, read_prompts
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store

__all__ = [
    "OFFLINE",
    "PROMPT_LISTS",
    "ImportReport",
    "OfflinePair",
    "Pair",
    "PromptReport",
    "Sample",
    "Store",
    "export_pairs",
    "filter_long",
    "load_prompts",
    "read_offline",
    "read_pickapic",
    "read_prompt_list",
    "read_prompts",
    "rewrite_pairs",
    "split_prompts",
    "verify_rewritten",
    "write_prompts",
]
