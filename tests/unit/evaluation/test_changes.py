"""Gains are measured image by image, and intervals of too little say so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffexpo.evaluation.alarms import History, Snapshot, check_alarms, looked_for
from diffexpo.evaluation.changes import gains_on_earlier, interval_notes, paired_change
from diffexpo.evaluation.metrics import bootstrap_mean, win_rate
from diffexpo.evaluation.records import SuiteResult
from diffexpo.evaluation.templates import between, digits
from diffexpo.types import Prompt

BOOTSTRAP = {"resamples": 500, "seed": 0}


def suite(scores: np.ndarray, name: str = "base") -> SuiteResult:
    prompts = tuple(Prompt(f"p{index}", f"prompt {index}") for index in range(len(scores)))
    rows = np.arange(len(scores))
    images = np.zeros((len(scores), 2, 2, 3), np.uint8)
    return SuiteResult(name, prompts, rows, 0 * rows, images, {"judge": scores}, {"judge": "heldout"})


def test_a_paired_gain_is_seen_through_a_spread_that_hides_it() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(0.0, 4.0, 60)
    after = before + 0.1 + generator.normal(0.0, 0.05, 60)
    mean, low, high = paired_change(suite(before), suite(after), "judge", BOOTSTRAP)
    assert mean == pytest.approx(0.1, abs=0.03) and 0.05 < low < high < 0.15
    assert bootstrap_mean(after, **BOOTSTRAP)[1] < bootstrap_mean(before, **BOOTSTRAP)[0]


def test_images_without_a_score_in_both_are_left_out() -> None:
    before, after = np.array([1.0, np.nan, 3.0]), np.array([2.0, 9.0, np.nan])
    assert paired_change(suite(before), suite(after), "judge", BOOTSTRAP)[0] == 1.0
    assert paired_change(suite(before * np.nan), suite(after), "judge", BOOTSTRAP) is None
    assert paired_change(suite(before), suite(after), None, BOOTSTRAP) is None


def test_an_iterate_is_compared_with_the_base_and_all_before_it() -> None:
    suites = {name: suite(np.arange(4.0) + number) for name, number in (("base", 0), ("iteration-1", 2))}
    suites["iteration-3"] = suite(np.arange(4.0) + 5)
    gains = gains_on_earlier(suites, 3, "judge", BOOTSTRAP)
    assert {number: gain[0] for number, gain in gains.items()} == {0: 5.0, 1: 3.0}


def test_alarms_compare_image_by_image_where_they_can_and_name_the_command() -> None:
    base = Snapshot(0, train_reward=(20.0, 19.0, 21.0), heldout_reward=(21.0, 20.0, 22.0))
    good = Snapshot(1, train_reward=(20.5, 19.5, 21.5), heldout_reward=(21.3, 20.3, 22.3))
    last = Snapshot(2, train_reward=(21.0, 20.0, 22.0), heldout_reward=(20.8, 19.8, 21.8))
    changes = {
        "train_change": (1.0, 0.8, 1.2),
        "heldout_changes": {0: (-0.2, -0.3, -0.1), 1: (-0.5, -0.6, -0.4)},
    }
    (unpaired,) = check_alarms(History((base, good, last), run="runs/a"))
    (paired,) = check_alarms(History((base, good, replace(last, **changes)), run="runs/a"))
    assert (unpaired.severity, paired.severity) == ("warning", "critical")
    assert "image by image -0.2, 95% -0.3 to -0.1" in paired.message
    assert "`diffexpo export runs/a --iteration 1`" in paired.what_to_do
    # A gain image by image is none to warn of, whatever the means say.
    rising = replace(last, train_change=(1.0, 0.8, 1.2), heldout_changes={0: (0.1, 0.05, 0.15)})
    assert check_alarms(History((base, good, rising))) == []


def test_little_evidence_is_told() -> None:
    few, many = [suite(np.arange(2.0))], [suite(np.arange(12.0))]
    assert interval_notes(1000, many) == []
    assert "1 bootstrap resample " in interval_notes(1, many)[0]
    assert "2 prompts" in interval_notes(1000, few)[0]


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    mean, low, high = bootstrap_mean([1.0, 2.0], ["a", "a"], **BOOTSTRAP)
    assert mean == 1.5 and np.isnan(low) and np.isnan(high)
    assert between(low, high) == "one prompt, no interval" and digits(low) == "unknown"
    assert between(0.25, 0.5) == "95% 0.250 to 0.500"
    undecided = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 2.0, 1.0], prompts=["a"] * 4, **BOOTSTRAP)
    assert undecided.interval == (0.75, 0.0, 1.0) and undecided.verdict == "undecided"


def test_only_what_was_measured_counts_as_checked() -> None:
    plain = Snapshot(0, heldout_reward=(1.0, 0.9, 1.1)), Snapshot(1, heldout_reward=(1.1, 1.0, 1.2))
    assert not any(looked_for(History(plain)).values())
    measured = [replace(one, vendi=4.0, train_reward=(1.0, 0.9, 1.1), reward_std=1.0) for one in plain]
    found = {what for what, is_known in looked_for(History(measured)).items() if is_known}
    assert found == {"over-optimisation", "loss of diversity", "flat rewards"}
    later = replace(measured[1], iteration=2, kl=3.0, win_rate=(0.6, 0.5, 0.7))
    more = {what for what, is_known in looked_for(History([*measured, later])).items() if is_known}
    assert more - found == {"worse than the base"}
