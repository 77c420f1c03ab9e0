"""What judges of looks are taught, that a stopped training goes on, and what the shipped ones tell apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.rewards.scenes import SceneLooks
from diffexpo.worlds import asset_path
from diffexpo.worlds.scenes.grammar import scenes_of
from worlds.emoji.models import make_vae
from worlds.scenes import train_looks
from worlds.scenes.damage import KINDS
from worlds.scenes.fit import Schedule
from worlds.scenes.quality_looks import damaged_pairs, share_right
from worlds.scenes.train_looks import JUDGES, LEAST, STEPS, TIE_SHARE, draw_damages, draw_pairs

SIZE_OF_BOTH = 1_500_000


def test_the_worse_image_has_the_damages_of_the_better_one_and_more() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_damages(rng) for _ in range(500)]
    for better, worse in drawn:
        assert all(worse[kind] >= strength for kind, strength in better.items())
        raised = [worse[kind] - better.get(kind, 0.0) for kind in worse if worse[kind] != better.get(kind)]
        assert 1 <= len(raised) <= 2 and min(raised) >= LEAST and max(worse.values()) <= 1
    assert {kind for _, worse in drawn for kind in worse} == set(KINDS)


def test_pairs_are_keyed_and_ties_have_their_share() -> None:
    images, labels = draw_pairs(300, [1, 2])
    again, other = draw_pairs(3, [1, 2])[0], draw_pairs(3, [2, 2])[0]
    assert torch.equal(images[:3], again) and not torch.equal(again, other)
    assert set(labels.tolist()) == {0.5, 1.0}
    share = float((labels == 0.5).float().mean())
    assert abs(share - TIE_SHARE) < 3 * (TIE_SHARE / len(labels)) ** 0.5


# The scheduler of diffusers mixes tensors and arrays in a way that newer NumPy warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_judge_is_trained_in_two_goes_as_in_one_and_read_by_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_looks, "POOL", {"recovered": 3, "latent": 2, "drawn": 2})
    monkeypatch.setattr(train_looks, "accuracy", lambda network, tokenizer: 0.5)
    torch.manual_seed(0)
    vae = make_vae()
    train_looks.train_looks("looks_train", 2, tmp_path, vae)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "looks_train").iterdir()}
    judge = SceneLooks("looks", str(tmp_path / "looks_train"))
    assert judge.score(torch.rand(2, 3, 64, 64), ["a red key", "four cats"]).isfinite().all()

    def stopped(num: int, key: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if key[2:] == [1]:
            raise KeyboardInterrupt
        return draw_pairs(num, key)

    parts = tmp_path / "parts"
    monkeypatch.setattr(train_looks, "Schedule", partial(Schedule, minutes_between_saves=0.0))
    monkeypatch.setattr(train_looks, "draw_pairs", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_looks.train_looks("looks_train", 2, parts, vae)
    monkeypatch.setattr(train_looks, "draw_pairs", draw_pairs)
    train_looks.train_looks("looks_train", 2, parts, vae)
    assert {file.name: file.read_bytes() for file in (parts / "looks_train").iterdir()} == whole


def test_no_prompt_is_drawn_for_both_judges() -> None:
    """Their halves of the prompts are taken in turn from one order."""
    assert sorted(judge.half for judge in JUDGES.values()) == [0, 1]
    assert (
        len({judge.seed for judge in JUDGES.values()}) == len({judge.shape for judge in JUDGES.values()}) == 2
    )
    assert 2 * train_looks.POOL["drawn"] <= len(scenes_of("train"))
    assert list(STEPS) == sorted(STEPS)


@pytest.mark.parametrize(
    ("name", "mean", "least"), [("looks_train", 0.75, 0.45), ("looks_heldout", 0.9, 0.65)]
)
def test_a_shipped_judge_tells_damages(name: str, mean: float, least: float) -> None:
    """The bounds are below the figures of docs/rewards/scenes.md by the chance of 40 pairs."""
    judge = SceneLooks(name, str(asset_path("scenes", name)))
    scenes = scenes_of("heldout")[300:340]
    texts = [scene.text for scene in scenes]
    shares = {
        kind: share_right(judge.score, *damaged_pairs(kind, (0.0, 1.0), scenes, 3), texts) for kind in KINDS
    }
    assert shares["blur"] >= 0.9 and shares["fade"] >= 0.9, shares
    assert min(shares.values()) >= least and np.mean(list(shares.values())) >= mean, shares


def test_both_shipped_judges_are_small() -> None:
    files = [file for name in JUDGES for file in asset_path("scenes", name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= SIZE_OF_BOTH
