"""The offline pairs of the scenes: made again alike, and labelled with the noise that they state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffexpo.data.offline.formats import find_format
from diffexpo.data.offline.votes import ImportReport, read_votes
from diffexpo.worlds import asset_path
from diffexpo.worlds.scenes.grammar import scenes_of
from worlds.preferences import from_jpeg
from worlds.scenes.offline import GUIDANCES, NOISE, STEPS, make_offline, score_images

SHIPPED = asset_path("scenes", "offline")
ROWS = pq.read_table(SHIPPED).to_pylist()
FACTS = json.loads(pq.read_schema(SHIPPED).metadata[b"diffexpo"])


# The scheduler of diffusers mixes tensors and arrays in a way that newer NumPy warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_small_set_follows_from_its_seed(tmp_path: Path) -> None:
    made = {}
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        make_offline(tmp_path / name, seed, num_prompts=2)
        made[name] = (tmp_path / name).read_bytes()
    assert made["one"] == made["again"] != made["other"]
    captions = {row["caption"] for row in pq.read_table(tmp_path / "one").to_pylist()}
    assert len(captions) == 2 and captions <= {scene.text for scene in scenes_of("train")}


def test_the_shipped_pairs_are_of_training_prompts_and_of_all_settings() -> None:
    assert len(ROWS) == FACTS["pairs"] >= 1000
    assert {row["caption"] for row in ROWS} <= {scene.text for scene in scenes_of("train")}
    assert len({row["caption"] for row in ROWS}) == FACTS["prompts"]
    models = {row[name] for row in ROWS for name in ("model_0", "model_1")}
    assert models == {
        f"scenes-diffusion/steps={steps}/guidance={scale:g}" for steps in STEPS for scale in GUIDANCES
    }
    assert SHIPPED.stat().st_size < 3 * 2**20


def test_the_shipped_labels_contradict_the_checker_as_often_as_stated() -> None:
    drawn = {(row["caption"], row[f"jpg_{side}"]) for row in ROWS for side in (0, 1)}
    captions, files = zip(*sorted(drawn), strict=True)
    images = np.stack([from_jpeg(data) for data in files])
    scores = score_images(asset_path("scenes", "checker_train"), images, captions)
    score_of = dict(zip(zip(captions, files, strict=True), scores, strict=True))
    sides = ([score_of[row["caption"], row[f"jpg_{side}"]] for row in ROWS] for side in (0, 1))
    gaps, labels = np.subtract(*sides), np.array([row["label_0"] for row in ROWS])
    is_tie = labels == 0.5
    assert is_tie.sum() == FACTS["ties"] == pytest.approx(NOISE.ties * len(ROWS), abs=1)
    flips = (labels[~is_tie] == 1) != (gaps[~is_tie] > 0)
    assert flips.sum() == FACTS["flips"]
    assert abs(flips.mean() - NOISE.flips) < 3 * (NOISE.flips * (1 - NOISE.flips) / len(flips)) ** 0.5


def test_the_reader_keeps_the_decided_pairs_and_counts_the_ties() -> None:
    name, form = find_format("auto", SHIPPED)
    report = ImportReport()
    kept = sum(1 for _ in read_votes(form, SHIPPED, report))
    assert name == "pickapic" and not report.quarantined
    assert (kept, report.ties) == (FACTS["pairs"] - FACTS["ties"], FACTS["ties"])
