"""The images, prompts and files of the emoji world that the package reads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from diffexpo.data.prompts import load_prompts
from diffexpo.worlds import emoji

ROWS = emoji.load_rows()
TRAIN = emoji.train_prompts()


def test_each_style_holds_every_emoji_once() -> None:
    assert Counter(row["style"] for row in ROWS) == {"noto": 3786, "twemoji": 3786}
    assert len({row["id"] for row in ROWS}) == len(ROWS) == 7572


def test_heldout_prompts_are_no_train_prompts() -> None:
    texts = {prompt.text for prompt in TRAIN}
    ids = [prompt.id for prompt in TRAIN + emoji.heldout_prompts()]
    assert len(set(ids)) == len(ids)
    assert not texts & {prompt.text for prompt in emoji.heldout_prompts()}
    kinds = {kind: emoji.heldout_prompts(kind) for kind in ("concept", "attributes", "caption")}
    assert [prompt for prompts in kinds.values() for prompt in prompts] == emoji.heldout_prompts("all")
    animals = emoji.animal_prompts()
    assert len(animals) == 24 and {p.text for p in animals} <= texts and animals[0].text == "noto bat"
    held = emoji.heldout_prompts("animals")
    assert 60 < len(held) < 120 and {p.id for p in held} < set(ids) - {p.id for p in TRAIN}
    assert min(len(prompts) for prompts in kinds.values()) >= 50
    unseen = {row["concept"] for row in ROWS if row["split_concept"] == "heldout"}
    assert {prompt.attributes["concept"] for prompt in kinds["concept"]} == unseen
    assert not unseen & {prompt.attributes["concept"] for prompt in TRAIN}


def test_prompts_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib, sys\nfrom diffexpo.worlds import emoji\n"
        "text = '\\n'.join(f'{p.id}|{p.text}' for p in emoji.train_prompts() + emoji.heldout_prompts())\n"
        "print(hashlib.sha256(text.encode()).hexdigest(), 'torch' in sys.modules)"
    )
    mine = "\n".join(f"{p.id}|{p.text}" for p in TRAIN + emoji.heldout_prompts())
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == [hashlib.sha256(mine.encode()).hexdigest(), "False"]


def test_images_are_rgb_on_white() -> None:
    images = emoji.load_images(["noto-1f525", "twemoji-1f525", "noto-2764"])
    assert images.dtype == np.float32 and images.shape == (3, 3, 64, 64)
    assert (images[:, :, 0, 0] == 1).all() and 0 <= images.min() < 0.5 and images.max() == 1
    heart = images[2, :, 32, 32]
    assert heart[0] > 0.7 and heart[1] < 0.4


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="noto-1f525"):
        emoji.load_images(["noto-nothing"])
    with pytest.raises(KeyError, match="judge_heldout"):
        emoji.asset_path("judge")
    with pytest.raises(KeyError, match="attributes"):
        emoji.heldout_prompts("captions")


def test_negatives_are_short_distinct_lines() -> None:
    path = emoji.asset_path("negatives")
    negatives = [prompt.text for prompt in load_prompts(str(path), "explore.negatives.source")]
    assert len(negatives) == len(set(negatives)) and 20 <= len(negatives) <= 40
    assert {"man", "blurry smudge"} <= set(negatives)
    assert not any("#" in negative for negative in negatives)


def test_all_assets_fit_in_40_megabytes_and_have_a_licence() -> None:
    folder = emoji.asset_path("images").parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for path in files:
        name = path.relative_to(folder).parts[0] + ("" if path.parent == folder else "/")
        assert name == "ATTRIBUTION.md" or f"`{name}`" in attribution, name
