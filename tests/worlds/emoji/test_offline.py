"""The shipped preference pairs."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
from PIL import Image

from diffexpo.worlds import emoji


def test_offline_pairs_are_pick_a_pic_rows_of_train_prompts() -> None:
    rows = pq.read_table(emoji.asset_path("offline")).to_pylist()
    texts = {prompt.text for prompt in emoji.train_prompts()}
    assert len(rows) >= 600 and {row["caption"] for row in rows} <= texts
    assert {row["label_0"] for row in rows} <= {0.0, 0.5, 1.0}
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1 and row["has_label"]
        best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == best
    for row in rows[::100]:
        for name in ("jpg_0", "jpg_1"):
            assert Image.open(io.BytesIO(row[name])).size == (64, 64)
