"""Each alarm fires on its own failure and stays silent on a healthy run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffexpo.evaluation.alarms import History, Snapshot, check_alarms, early_alarms, start_error

BASE = Snapshot(0, train_reward=(20.0, 19.8, 20.2), heldout_reward=(21.0, 20.8, 21.2), vendi=4.5)
GOOD = Snapshot(
    1,
    train_reward=(21.0, 20.8, 21.2),
    heldout_reward=(21.6, 21.4, 21.8),
    win_rate=(0.66, 0.58, 0.74),
    vendi=4.2,
    kl=6.0,
    implicit_accuracy=0.64,
    winner_error=0.301,
    loser_error=0.318,
    winner_reference_error=0.30,
    loser_reference_error=0.31,
    reward_std=1.1,
    images=512,
    images_failed=3,
    groups=64,
    dropped_ties=3,
    skipped_steps=0,
)


def names(*snapshots: Snapshot, kl_budget: float | None = None) -> list[tuple[str, str]]:
    return [(alarm.name, alarm.severity) for alarm in check_alarms(History(snapshots, kl_budget))]


def test_silence_on_a_healthy_run_and_on_an_empty_one() -> None:
    assert names(BASE, GOOD) == []
    assert names() == []
    assert names(BASE) == []
    assert names(Snapshot(1)) == []


def test_the_documented_collapse_fires() -> None:
    """Implicit accuracy 0.96 and both errors up by 0.7, as a learning rate of 1e-4 at beta 300 once did."""
    for rise in (lambda error: error + 0.7, lambda error: error * 1.7):
        bad = replace(
            GOOD,
            implicit_accuracy=0.96,
            winner_error=rise(0.30),
            loser_error=rise(0.31),
            win_rate=(0.22, 0.14, 0.31),
        )
        found = names(BASE, bad)
        assert ("collapse", "critical") in found and ("worse_than_base", "critical") in found
    text = check_alarms(History((BASE, bad)))[0]
    assert "0.96" in text.message and "learning_rate" in text.what_to_do


def test_collapse_needs_both_errors_up() -> None:
    assert names(BASE, replace(GOOD, implicit_accuracy=0.96, loser_error=0.62)) == []
    assert names(BASE, replace(GOOD, winner_error=0.6, loser_error=0.62)) == []


RISEN = replace(GOOD, winner_error=0.6, loser_error=0.62)
"""Both errors doubled, while the held-out judge found the images better."""


def test_errors_that_rise_are_a_warning_only_where_the_score_falls_too() -> None:
    second = replace(RISEN, iteration=2)
    assert names(BASE, GOOD, second) == []
    worse = replace(second, heldout_reward=(21.3, 21.1, 21.5))
    assert names(BASE, GOOD, worse) == [("errors_rise", "warning")]
    alarm = check_alarms(History((BASE, GOOD, worse)))[0]
    assert alarm.message.startswith("iteration 2: the error on winners rose by 100%")
    assert "the score fell from 21.6 to 21.3" in alarm.message
    # A validation judge, where there is one, is asked instead of the held-out one.
    assert names(BASE, replace(GOOD, validation=0.4), replace(worse, validation=0.5)) == []
    assert names(BASE, replace(GOOD, validation=0.4), replace(second, validation=0.3)) == [
        ("errors_rise", "warning")
    ]
    # Errors that rise no further than those of the anchor are where the anchor wants them.
    assert names(BASE, GOOD, replace(worse, anchor_error=0.55)) == []
    assert names(BASE, GOOD, replace(worse, anchor_error=0.45)) == [("errors_rise", "warning")]


def test_a_common_part_that_comes_before_a_collapse() -> None:
    bad = replace(RISEN, common_part=0.9)
    assert names(BASE, bad) == [("common_part", "critical")]
    alarm = check_alarms(History((BASE, bad)))[0]
    assert (
        "together lie 90% above the reference's" in alarm.message
        and "algorithm.anchor_weight" in alarm.what_to_do
    )
    assert names(BASE, replace(bad, common_part=0.5)) == []
    assert names(BASE, replace(bad, implicit_accuracy=0.96)) == [("collapse", "critical")]
    # 1.9 times 0.305 is 0.58; less 0.4 of the anchor it is 0.59 of 0.305, less 0.3 it is 0.92.
    assert names(BASE, replace(bad, anchor_error=0.4)) == []
    assert names(BASE, replace(bad, anchor_error=0.3)) == [("common_part", "critical")]


def test_a_common_part_is_measured_by_the_errors_with_which_training_began() -> None:
    """A reference that moves along has larger errors itself: 40% of them are 120% of the first ones."""
    later = replace(
        GOOD, iteration=3, winner_reference_error=0.9, loser_reference_error=0.93, common_part=0.4
    )
    later = replace(later, winner_error=1.26, loser_error=1.3)
    assert names(BASE, later) == []
    assert names(BASE, GOOD, later) == [("common_part", "critical")]


@pytest.mark.parametrize(
    ("ratio", "anchor", "fires"),
    [(1.06, None, False), (1.08, None, True), (0.9, None, False), (1.09, 1.03, False), (1.11, 1.03, True)],
)
def test_predictions_that_grow_beyond_reference_and_anchor(
    ratio: float, anchor: float | None, fires: bool
) -> None:
    item = replace(GOOD, norm_ratio=ratio, anchor_norm_ratio=anchor)
    assert names(BASE, item) == ([("prediction_norm", "warning")] if fires else [])


@pytest.mark.parametrize(("high", "severity"), [(21.3, "warning"), (20.9, "critical")])
def test_over_optimisation(high: float, severity: str) -> None:
    bad = replace(GOOD, heldout_reward=(20.7, 20.5, high), win_rate=(0.48, 0.40, 0.56))
    assert names(BASE, bad) == [("over_optimisation", severity)]


@pytest.mark.parametrize(("vendi", "expected"), [(3.9, []), (3.4, ["warning"]), (2.0, ["critical"])])
def test_diversity_drop_is_measured_above_the_minimum_of_one(vendi: float, expected: list[str]) -> None:
    assert [
        severity for name, severity in names(BASE, replace(GOOD, vendi=vendi)) if name == "diversity"
    ] == expected


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"reward_std": 0.0}, "zero_variance"),
        ({"dropped_ties": 40}, "many_ties"),
        ({"images_failed": 60}, "scorer_failures"),
        ({"skipped_steps": 2}, "skipped_steps"),
        ({"implicit_accuracy": 0.5}, "no_learning"),
    ],
)
def test_data_and_training_alarms(change: dict[str, float], name: str) -> None:
    assert [found for found, _ in names(BASE, replace(GOOD, **change))] == [name]


def test_kl_budget_and_kl_without_return() -> None:
    assert names(BASE, GOOD, kl_budget=5.0) == [("kl_budget", "warning")]
    assert names(BASE, GOOD, kl_budget=7.0) == []
    later = replace(
        GOOD, iteration=2, kl=20.0, heldout_reward=(21.2, 21.1, 21.4), win_rate=(0.55, 0.47, 0.63)
    )
    assert names(BASE, GOOD, later) == [("kl_without_return", "warning")]


def test_critical_comes_first() -> None:
    bad = replace(GOOD, skipped_steps=1, implicit_accuracy=0.5, win_rate=(0.2, 0.1, 0.3))
    assert [severity for _, severity in names(BASE, bad)] == ["critical", "warning", "note"]


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (0.0, [("improver_identity", "critical")]),
        (0.049, [("improver_identity", "critical")]),
        (0.05, []),
        (0.28, []),
        (0.9, []),
        (0.95, [("improver_unrelated", "warning")]),
        (1.3, [("improver_unrelated", "warning")]),
        (None, []),
    ],
)
def test_improved_images_are_neither_their_losers_nor_unrelated(
    distance: float | None, expected: list[tuple[str, str]]
) -> None:
    assert names(BASE, replace(GOOD, improved_distance=distance)) == expected
    # Nothing is improved before the first iteration.
    assert names(replace(BASE, improved_distance=distance), GOOD) == []


def test_the_alarms_of_the_improvement_model_say_the_scale_and_what_to_change() -> None:
    near, far = (
        check_alarms(History((BASE, replace(GOOD, improved_distance=distance))))[0]
        for distance in (0.01, 1.2)
    )
    assert "0.010 times as far from their losers as losers of different prompts" in near.message
    assert "below 0.05" in near.message and "image_scale" in near.what_to_do
    assert "above 0.9" in far.message and "reconstruct" in far.what_to_do


# Measured on scenes: errors of winners and losers, those of the reference, common part, norm ratio, error and norm ratio of
# the anchor, and the share of held-out images (DEFAULT: validation images) that is entirely right, of the iterations from the
# first that is trained on.
Row = tuple[float, ...]
ONE_DRAW: tuple[Row, ...] = (
    (0.0802, 0.0996, 0.0372, 0.0462, 0.5655, 1.1018, 0, 0, 0.490),
    (0.1705, 0.1944, 0.0880, 0.1001, 0.5748, 1.0718, 0, 0, 0.580),
    (0.2710, 0.3027, 0.1633, 0.1810, 0.4162, 1.0609, 0, 0, 0.527),
    (0.3907, 0.4402, 0.2861, 0.3201, 0.2493, 1.0427, 0, 0, 0.500),
    (0.4556, 0.5029, 0.3842, 0.4192, 0.1449, 1.0260, 0, 0, 0.333),
)
FOUR_DRAWS: tuple[Row, ...] = (
    (0.0780, 0.0990, 0.0361, 0.0457, 0.6380, 1.1128, 0, 0, 0.447),
    (0.1756, 0.2042, 0.0819, 0.0966, 0.7259, 1.0835, 0, 0, 0.520),
    (0.3065, 0.3466, 0.1754, 0.1998, 0.4637, 1.0668, 0, 0, 0.500),
    (0.4193, 0.4663, 0.3147, 0.3489, 0.2223, 1.0400, 0, 0, 0.310),
)
DEFAULT: tuple[Row, ...] = (
    (0.0566, 0.0702, 0.0418, 0.0489, 0.2690, 1.0547, 0.0606, 1.0051, 0.613),
    (0.0624, 0.0787, 0.0463, 0.0544, 0.3871, 1.0524, 0.0592, 0.9722, 0.627),
)
HELD: tuple[Row, ...] = (
    (0.0574, 0.0730, 0.0372, 0.0453, 0.3033, 1.0690, 0.0709, 1.0274, 0.437),
    (0.0540, 0.0691, 0.0440, 0.0525, 0.2865, 1.0425, 0.0692, 0.9746, 0.510),
)


def measured(rows: tuple[Row, ...]) -> tuple[Snapshot, ...]:
    first = Snapshot(0, heldout_reward=(0.4, 0.4, 0.4))
    names = ("winner_error", "loser_error", "winner_reference_error", "loser_reference_error", "common_part")
    names += ("norm_ratio", "anchor_error", "anchor_norm_ratio")
    told = [dict(zip(names, row, strict=False)) for row in rows]
    return first, *(
        Snapshot(number, heldout_reward=(row[-1],) * 3, implicit_accuracy=0.7, **values)
        for number, (row, values) in enumerate(zip(rows, told, strict=True), start=2)
    )


@pytest.mark.parametrize(("rows", "falls"), [(ONE_DRAW, 4), (FOUR_DRAWS, 5)])
def test_measured_runs_that_collapse_are_called_before_they_fall(rows: tuple[Row, ...], falls: int) -> None:
    """The share falls 5 points below its best so far in iteration `falls`; training alone tells it before."""
    shares = [row[-1] for row in rows]
    fallen = [k for k, share in enumerate(shares, start=2) if share <= max(shares[: k - 1]) - 0.05]
    assert fallen[0] == falls
    start = start_error(measured(rows)[1:])
    found = {item.iteration: {one.name for one in early_alarms(item, start)} for item in measured(rows)[1:]}
    assert found[2] == {"prediction_norm"} and found[3] == {"common_part", "prediction_norm"}
    assert all("common_part" in names for iteration, names in found.items() if iteration > 2)
    told = [alarm.message for alarm in check_alarms(History(measured(rows))) if alarm.name == "errors_rise"]
    assert [message[:12] for message in told] == [
        f"iteration {falls if rows is ONE_DRAW else 4}:",
        "iteration 5:",
    ]


def test_the_iterate_to_go_back_to_is_one_that_raised_nothing_critical_itself() -> None:
    told = {
        alarm.message[:11]: alarm.what_to_do
        for alarm in check_alarms(History(measured(ONE_DRAW), run="runs/a"))
        if alarm.name == "common_part"
    }
    assert len(told) > 2
    assert all("`diffexpo export runs/a --iteration 2`" in advice for advice in told.values())


@pytest.mark.parametrize("rows", [HELD, DEFAULT])
def test_measured_runs_that_hold_raise_nothing_although_both_errors_rise(rows: tuple[Row, ...]) -> None:
    assert all(min(row[0] / row[2], row[1] / row[3]) > 1.2 for row in rows)
    assert check_alarms(History(measured(rows))) == []
