"""The shipped judges know what they see."""

from __future__ import annotations

import pytest
import torch

from diffexpo.worlds import emoji
from worlds.emoji import attributes
from worlds.emoji.corrupt import spoil
from worlds.emoji.quality import Judge, retrieval


@pytest.mark.parametrize("name", ["judge_train", "judge_heldout"])
def test_judges_find_the_caption_of_real_pictures_and_dislike_spoiled_ones(name: str) -> None:
    judge = Judge(name)
    for own, least in ((True, 0.7), (False, 0.55)):
        rows = [row for row in emoji.load_rows() if (attributes.judge_of(row) == name) == own][::25]
        texts = [f"{row['style']} {row['caption']}" for row in rows]
        pictures = torch.from_numpy(emoji.load_images([row["id"] for row in rows]))
        scores = judge.similarities(pictures, texts)
        assert retrieval(scores)[0] > least
        spoiled = judge.similarities(spoil(pictures, torch.Generator().manual_seed(0)), texts).diagonal()
        assert float((scores.diagonal() > spoiled).float().mean()) > 0.8
