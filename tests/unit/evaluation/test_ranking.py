"""Rankings by duels: exact values, known strengths, honest intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffexpo.errors import DataError
from diffexpo.evaluation.metrics import bradley_terry
from diffexpo.evaluation.ranking import Duel, duels_of_scores, duels_of_votes, rank
from diffexpo.rng import numpy_generator

NAMES = ("a", "b", "c", "d")
TRUE = np.array([0.9, 0.3, -0.2, -1.0])
TRIALS = 300


def drawn(prompts: int, others: int, draw: np.random.Generator, of_other: float) -> list[Duel]:
    """Duels of all couples on prompts and raters (or seeds) with tastes of their own."""
    tastes = draw.normal(0, of_other, (others, len(NAMES)))
    looks = draw.normal(0, 0.7, (prompts, len(NAMES)))
    duels = []
    for prompt in range(prompts):
        for other in range(others):
            worth = TRUE + tastes[other] + looks[prompt]
            for i in range(4):
                for j in range(i + 1, 4):
                    value = float(draw.random() < 1 / (1 + math.exp(worth[j] - worth[i])))
                    duels.append(Duel(NAMES[i], NAMES[j], value, prompt, other))
    return duels


def pseudo_truth(of_other: float) -> np.ndarray:
    """The strengths that fit the expected wins: tastes blur the true ones."""
    noise = numpy_generator(0, "truth").normal(0, math.sqrt(of_other**2 + 0.49), (100_000, 2))
    wins = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            gap = TRUE[i] - TRUE[j] + noise[:, 0] - noise[:, 1]
            wins[i, j] = (1 / (1 + np.exp(-gap))).mean()
    found = np.log(bradley_terry(wins))
    return found - found.mean()


@pytest.mark.parametrize(("prompts", "others", "of_other"), [(40, 1, 0.0), (20, 8, 0.5)])
def test_intervals_of_strengths_cover_the_truth(prompts: int, others: int, of_other: float) -> None:
    draw, truth, covered = numpy_generator(1, "coverage", prompts), pseudo_truth(of_other), 0
    for _ in range(TRIALS if others == 1 else TRIALS // 3):
        found = {one.name: one.strength for one in rank(drawn(prompts, others, draw, of_other)).models}
        covered += sum(found[name][1] <= truth[i] <= found[name][2] for i, name in enumerate(NAMES))
    assert 0.93 <= covered / (4 * (TRIALS if others == 1 else TRIALS // 3)) <= 0.97


def test_strengths_of_two_models_are_their_log_odds() -> None:
    duels = [Duel("a", "b", float(number < 3), number) for number in range(4)]
    first, second = rank(duels).models
    assert (first.name, first.strength[0]) == ("a", pytest.approx(0.5 * math.log(3)))
    assert second.strength[0] == pytest.approx(-0.5 * math.log(3))
    assert first.against_average[0] == pytest.approx(1 / (1 + 3**-0.5)) and first.duels == 4
    # H = 4 * 3/16; of the rows' influence on s_a, (value - 3/4) / (2 H), the variance with n / (n - 1).
    error = math.sqrt(4 / 3 * (3 * 0.25**2 + 0.75**2)) / (2 * 0.75)
    assert first.strength[2] - first.strength[0] == pytest.approx(3.182446 * error, rel=1e-5)


def test_order_of_duels_and_of_their_sides_does_not_matter() -> None:
    duels = drawn(10, 2, numpy_generator(2, "order"), 0.3)
    turned = [Duel(one.second, one.first, 1 - one.value, one.prompt, one.other) for one in reversed(duels)]
    for one, other in zip(rank(duels).models, rank(turned).models, strict=True):
        assert one.name == other.name and (one.best, one.worst) == (other.best, other.worst)
        assert one.strength == pytest.approx(other.strength, abs=1e-8)


def test_ranks_are_as_open_as_the_intervals_leave_them() -> None:
    many = rank(drawn(60, 4, numpy_generator(3, "ranks"), 0.0)).models
    assert [one.name for one in many] == list(NAMES)
    assert many[0].best == 1 and many[-1].worst == 4 and many[0].worst < 4 and many[-1].best > 1
    few = rank(drawn(3, 1, numpy_generator(4, "few"), 0.0)).models
    assert all(one.worst - one.best >= 2 for one in few)


def test_a_model_that_never_lost_is_ranked_with_half_a_win_for_the_others() -> None:
    ranking = rank([Duel("a", "b", 1.0, number) for number in range(9)])
    assert ranking.is_shrunk and ranking.models[0].name == "a"
    assert ranking.models[0].strength[0] == pytest.approx(0.5 * math.log(9.5 / 0.5))
    assert not rank([Duel("a", "b", 0.5, number) for number in range(3)]).is_shrunk
    with pytest.raises(DataError, match="no duel"):
        rank([])


def test_duels_come_from_shared_images_and_from_votes() -> None:
    scores = {"a": {(0, "p", 0): 1.0, (0, "q", 0): 2.0}, "b": {(0, "p", 0): 1.0, (0, "q", 0): math.nan}}
    assert duels_of_scores(scores) == [Duel("a", "b", 0.5, "p", 0)]
    row = {"question": "quality", "prompt_id": "p", "rater": "r", "a": "x", "b": "y"}
    rows = [row | {"answer": answer} for answer in ("a", "b", "tie", "skip")]
    assert [duel.value for duel in duels_of_votes(rows, "quality")] == [1.0, 0.0, 0.5]
    assert duels_of_votes(rows, "alignment") == []
