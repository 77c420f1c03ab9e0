"""A run's pairs as one Parquet file: the Pick-a-Pic v2 columns, then nullable ones of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.data.columns import Columns
from diffexpo.data.images import encode_png
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.files import replacing
from diffexpo.rng import keyed_choice

Decode = Callable[[np.ndarray], np.ndarray]
SCHEMA_VERSION = 1
_PICKAPIC = """
are_different:bool best_image_uid:string caption:string created_at:timestamp[ns] has_label:bool
image_0_uid:string image_0_url:string image_1_uid:string image_1_url:string jpg_0:binary jpg_1:binary
label_0:double label_1:double model_0:string model_1:string ranking_id:int64 user_id:int64
num_example_per_prompt:int64 __index_level_0__:int64
"""
_OURS = """
pair_id:string iteration:int64 agent_0:string agent_1:string negative_prompt_0:string
negative_prompt_1:string seed_0:string seed_1:string sampler:string steps:int64 guidance_scale:double
width:int64 height:int64 rewards_0:map rewards_1:map reward_margin:double source:string judge:string
question:string confidence:double schema_version:int64
"""
_TYPES = {"map": pa.map_(pa.string(), pa.float64()), "timestamp[ns]": pa.timestamp("ns")}


def _fields(columns: str) -> list[pa.Field]:
    named = (column.split(":") for column in columns.split())
    return [pa.field(name, _TYPES.get(kind) or pa.type_for_alias(kind)) for name, kind in named]


EXPORT_SCHEMA = pa.schema([*_fields(_PICKAPIC), *_fields(_OURS)])
"""The 19 columns of Pick-a-Pic v2 in its order, then ours."""


def export_pairs(
    store: Store, out_path: str | Path, decode: Decode, *, source: str | None = None, chunk: int = 64
) -> int:
    """Write pairs with their images; the file appears when it is whole.

    Args:
        store: Complete stages are exported.
        out_path: Parquet file to write.
        decode: Latents (N,C,h,w) -> uint8 images (N,H,W,3), e.g. `pixel_decoder(policy)`.
        source: Only pairs of this source (offline, online, human); all by default.
        chunk: Pairs decoded at once.
    Returns:
        Number of pairs written. Images are PNG (nothing is lost by encoding them); those of offline pairs
        are decoded from latents too, so they are the model's view of the original. Which side the winner is
        on is drawn by key.
    """
    refs = Columns(store.table("pairs", ["source", "prompt"], encoded=("source", "prompt")), dict)
    if source is not None:
        refs = refs.take(np.flatnonzero(refs.equals("source", source)))
    if not refs:
        raise DataError(
            f"{store.root} holds no {source or 'complete'} pairs to export; run the pair stage first"
        )
    counts, number = refs.counts("prompt"), 0
    with (
        replacing(Path(out_path)) as temporary,
        pq.ParquetWriter(temporary, EXPORT_SCHEMA, compression="zstd") as writer,
    ):
        for pairs in store.parts("pairs", Pair, source):
            for start in range(0, len(pairs), chunk):
                rows = _rows(store, decode, pairs[start : start + chunk], counts, number)
                writer.write_table(pa.Table.from_pylist(rows, schema=EXPORT_SCHEMA))
                number += len(rows)
    return number


def _rows(
    store: Store, decode: Decode, pairs: Sequence[Pair], counts: Mapping[str, int], first: int
) -> list[dict[str, object]]:
    ids = list(dict.fromkeys(name for pair in pairs for name in (pair.winner_id, pair.loser_id)))
    samples = {sample.sample_id: sample for sample in store.samples_of(ids)}
    decoded = (image for latents in store.stretches(ids) for image in decode(latents))
    images = dict(zip(ids, decoded, strict=True))
    numbered = enumerate(pairs, start=first)
    return [_row(pair, samples, images, counts[pair.prompt], number) for number, pair in numbered]


def _row(
    pair: Pair, samples: Mapping[str, Sample], images: Mapping[str, np.ndarray], per_prompt: int, number: int
) -> dict[str, object]:
    # a winner that always came first would teach a reader of the file the position
    winner_side = keyed_choice(2, "export", pair.pair_id)
    ids = [pair.loser_id, pair.loser_id]
    ids[winner_side] = pair.winner_id
    drawn_by = samples[pair.winner_id].sampler_settings
    height, width = images[ids[0]].shape[:2]
    row: dict[str, object] = {
        "are_different": True,
        "best_image_uid": pair.winner_id,
        "caption": pair.prompt,
        "has_label": True,
        "num_example_per_prompt": per_prompt,
        "__index_level_0__": number,
        "pair_id": pair.pair_id,
        "iteration": pair.iteration,
        "sampler": drawn_by.get("name"),
        "steps": drawn_by.get("steps"),
        "guidance_scale": drawn_by.get("guidance"),
        "width": width,
        "height": height,
        "reward_margin": pair.margin,
        "source": pair.source,
        "judge": pair.judge,
        "question": pair.judge.partition(":")[2] if pair.votes else None,
        "confidence": pair.agreement,
        "schema_version": SCHEMA_VERSION,
    }
    for side, sample_id in enumerate(ids):
        sample = samples[sample_id]
        row |= {
            f"image_{side}_uid": sample_id,
            f"jpg_{side}": encode_png(images[sample_id]),
            f"label_{side}": float(side == winner_side),
            f"model_{side}": sample.model,
            f"agent_{side}": sample.agent,
            f"negative_prompt_{side}": sample.negative_prompt,
            f"seed_{side}": sample.seed_key,
            f"rewards_{side}": sample.rewards,
        }
    return row
