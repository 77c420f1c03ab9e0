"""An export is readable as Pick-a-Pic v2 and says the same as the store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffexpo.data.export import EXPORT_SCHEMA, export_pairs
from diffexpo.data.latents import pixel_decoder
from diffexpo.data.offline.formats import read_pickapic
from diffexpo.data.store import Store
from diffexpo.errors import DataError

from .conftest import LetterPolicy, fill

PICKAPIC = [
    "are_different",
    "best_image_uid",
    "caption",
    "created_at",
    "has_label",
    "image_0_uid",
    "image_0_url",
    "image_1_uid",
    "image_1_url",
    "jpg_0",
    "jpg_1",
    "label_0",
    "label_1",
    "model_0",
    "model_1",
    "ranking_id",
    "user_id",
    "num_example_per_prompt",
    "__index_level_0__",
]


def test_a_round_trip_keeps_winners_and_pixels(tmp_path: Path, policy: LetterPolicy) -> None:
    store = Store(tmp_path / "store")
    fill(store, 1, 40)
    decode = pixel_decoder(policy, batch_size=7)
    assert export_pairs(store, tmp_path / "out.parquet", decode, chunk=16) == 40
    read = list(read_pickapic(tmp_path / "out.parquet"))
    assert [pair.winner_uid for pair in read] == [row.winner_id for row in store.pairs()]
    assert [pair.margin for pair in read] == [1.0] * 40
    for pair in read[:5]:
        pixels = np.array(Image.open(io.BytesIO(pair.winner_jpg)))
        np.testing.assert_array_equal(pixels, decode(store.latents([str(pair.winner_uid)]))[0])
    sides = pq.read_table(tmp_path / "out.parquet", columns=["label_0"])["label_0"].to_pylist()
    assert 8 < sum(sides) < 32  # the winner stands on both sides


def test_the_columns_are_pick_a_pics_then_ours(tmp_path: Path, policy: LetterPolicy) -> None:
    store = Store(tmp_path / "store")
    fill(store, 1, 3)
    export_pairs(store, tmp_path / "out.parquet", pixel_decoder(policy))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names[:19] == PICKAPIC and table.schema.types == EXPORT_SCHEMA.types
    row = table.slice(0, 1).to_pylist(maps_as_pydicts="strict")[0]
    winner = int(row["label_1"])
    assert row["best_image_uid"] == row[f"image_{winner}_uid"] == "1w0" and row["has_label"] is True
    assert row[f"agent_{winner}"] == "exploration" and row["rewards_0"] == {"judge": 0.5}
    assert (row["iteration"], row["source"], row["width"], row["num_example_per_prompt"]) == (
        1,
        "online",
        8,
        1,
    )


def test_nothing_to_export_is_said_and_leaves_no_file(tmp_path: Path, policy: LetterPolicy) -> None:
    with pytest.raises(DataError, match="holds no complete pairs to export"):
        export_pairs(Store(tmp_path / "store"), tmp_path / "out.parquet", pixel_decoder(policy))
    store = Store(tmp_path / "store")
    fill(store, 1, 2)
    with pytest.raises(ZeroDivisionError):
        export_pairs(store, tmp_path / "out.parquet", lambda latents: np.zeros(1 // 0))
    assert not list(tmp_path.glob("out*"))
