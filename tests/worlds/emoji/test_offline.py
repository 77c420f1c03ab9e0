"""The shipped preference pairs and the noise of their labels."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffexpo.worlds import emoji
from worlds.emoji.offline import flip_temperature


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


def test_flip_temperature_gives_the_share_asked_for() -> None:
    gaps = np.random.default_rng(0).normal(size=500) * 3
    temperature = flip_temperature(gaps, 0.2)
    assert (1 / (1 + np.exp(np.abs(gaps) / temperature))).mean() == pytest.approx(0.2, abs=1e-6)
