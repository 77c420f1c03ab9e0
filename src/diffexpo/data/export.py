"""A run's pairs as one Parquet file: the Pick-a-Pic v2 columns, then nullable ones of our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffexpo.data.images import encode_png
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store
from diffexpo.errors import DataError
from diffexpo.files import replacing
from diffexpo.rng import keyed_choice

SCHEMA_VERSION = 1
_REWARDS = pa.map_(pa.string(), pa.float64())
EXPORT_SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
        ("pair_id", pa.string()),
        ("iteration", pa.int64()),
        ("agent_0", pa.string()),
        ("agent_1", pa.string()),
        ("negative_prompt_0", pa.string()),
        ("negative_prompt_1", pa.string()),
        ("seed_0", pa.string()),
        ("seed_1", pa.string()),
        ("sampler", pa.string()),
        ("steps", pa.int64()),
        ("guidance_scale", pa.float64()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("rewards_0", _REWARDS),
        ("rewards_1", _REWARDS),
        ("reward_margin", pa.float64()),
        ("source", pa.string()),
        ("judge", pa.string()),
        ("question", pa.string()),
        ("confidence", pa.float64()),
        ("schema_version", pa.int64()),
    ]
)
"""The 19 columns of Pick-a-Pic v2 in its order, then ours."""


def export_pairs(
    store: Store,
    out_path: str | Path,
    decode: Callable[[np.ndarray], np.ndarray],
    *,
    source: str | None = None,
    chunk: int = 64,
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Write pairs with their images; the file appears when it is whole.

    Args:
        store: Complete stages are exported.
        out_path: Parquet file to write.
        decode: Latents (N,C,h,w) -> uint8 images (N,H,W,3), e.g. `pixel_decoder(policy)`.
        source: Only pairs of this source (offline, online, human); all by default.
        chunk: Pairs decoded at once.
        tick: Called after each chunk.
    Returns:
        Number of pairs written. Images are PNG (nothing is lost by encoding them); those of offline pairs
        are decoded from latents too, so they are the model's view of the original. Which side the winner
        stands on is drawn by key.
    Raises:
        DataError: there are no such pairs.
        StoreError: the disk is full, or the store is damaged.
    """
    pairs = store.pairs(source=source)
    if not pairs:
        raise DataError(
            f"{store.root} holds no {source or 'complete'} pairs to export; run the pair stage first"
        )
    counts = Counter(pair.prompt for pair in pairs)
    samples = {sample.sample_id: sample for sample in store.samples()}
    out_path = Path(out_path)
    with (
        replacing(out_path) as temporary,
        pq.ParquetWriter(temporary, EXPORT_SCHEMA, compression="zstd") as writer,
    ):
        for start in range(0, len(pairs), chunk):
            part = pairs[start : start + chunk]
            images = _decode(store, part, decode)
            rows = [
                _row(pair, samples, images, counts[pair.prompt], start + offset)
                for offset, pair in enumerate(part)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=EXPORT_SCHEMA))
            tick()
    return len(pairs)


def _decode(
    store: Store, pairs: Sequence[Pair], decode: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    ids = list(dict.fromkeys(name for pair in pairs for name in (pair.winner_id, pair.loser_id)))
    images = [image for part in store.stretches(ids) for image in decode(part)]
    return dict(zip(ids, images, strict=True))


def _row(
    pair: Pair, samples: Mapping[str, Sample], images: Mapping[str, np.ndarray], per_prompt: int, number: int
) -> dict[str, object]:
    # a winner that always stood first would teach a reader of the file the position
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
