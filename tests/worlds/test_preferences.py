"""Labels of preference sets: how often they contradict the judge, and which pairs are ties."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from diffexpo.types import Prompt
from worlds.preferences import LabelNoise, draw_planned, flip_temperature, label_pairs, plan_images

PROMPTS = [Prompt(f"p{number}", f"text {number}") for number in range(400)]
PLAN = plan_images(PROMPTS, {"one": 0.25, "two": 0.75}, (6, 10), (1.0, 2.5, 4.0))
NOISE = LabelNoise(flips=0.16, ties=0.12)
SCORES = np.random.default_rng(0).normal(size=len(PLAN)) * 3


def labelled(seed=0):
    return label_pairs(PLAN, [item.key.encode() for item in PLAN], SCORES, seed, NOISE)


def test_flip_temperature_gives_the_share_asked_for() -> None:
    gaps = np.random.default_rng(0).normal(size=500) * 3
    temperature = flip_temperature(gaps, 0.2)
    assert (1 / (1 + np.exp(np.abs(gaps) / temperature))).mean() == pytest.approx(0.2, abs=1e-6)


def test_sources_and_settings_are_drawn_as_often_as_stated() -> None:
    shares = Counter(item.source for item in PLAN)
    # Three standard errors of a share.
    assert abs(shares["one"] / len(PLAN) - 0.25) < 3 * (0.25 * 0.75 / len(PLAN)) ** 0.5
    for setting, count in Counter((item.steps, item.guidance) for item in PLAN).items():
        assert abs(count / len(PLAN) - 1 / 6) < 3 * (5 / 36 / len(PLAN)) ** 0.5, setting


def test_what_was_planned_comes_back_in_its_place() -> None:
    plan = PLAN[:30]

    def draw(items):
        assert len({item.model for item in items}) == 1
        return np.stack([np.full((64, 64, 3), PLAN.index(item), dtype=np.uint8) for item in items])

    assert draw_planned(plan, draw)[:, 0, 0, 0].tolist() == list(range(30))


def test_the_closest_pairs_are_ties_and_the_stated_share_of_the_others_is_flipped() -> None:
    rows, facts = labelled()
    # Images 3 p, 3 p + 1, 3 p + 2 are those of prompt p; its pairs are (0, 1), (0, 2) and (1, 2).
    scores = SCORES.reshape(-1, 3)
    gaps = np.stack([scores[:, a] - scores[:, b] for a, b in ((0, 1), (0, 2), (1, 2))], axis=1).ravel()
    labels = np.array([row["label_0"] for row in rows])
    is_tie = labels == 0.5
    assert facts["ties"] == is_tie.sum() == round(NOISE.ties * len(rows))
    assert np.abs(gaps[is_tie]).max() <= np.abs(gaps[~is_tie]).min()
    flips = (labels[~is_tie] == 1) != (gaps[~is_tie] > 0)
    assert facts["flips"] == flips.sum()
    assert abs(flips.mean() - NOISE.flips) < 3 * (NOISE.flips * (1 - NOISE.flips) / len(flips)) ** 0.5
    # Bradley-Terry: a judge that is sure is contradicted less often.
    sure = np.abs(gaps[~is_tie]) > np.median(np.abs(gaps[~is_tie]))
    assert flips[sure].mean() < flips[~sure].mean() / 3


def test_labels_follow_from_the_seed() -> None:
    again, other = labelled()[0], labelled(seed=1)[0]
    assert labelled()[0] == again
    assert [row["label_0"] for row in other] != [row["label_0"] for row in again]
