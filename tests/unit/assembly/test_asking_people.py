"""Which images people are asked about: by key, by the other rewards' extremes, or by their disputes."""

from __future__ import annotations

import numpy as np

from diffexpo.assembly.asking_people import choose_couples
from diffexpo.config.people import Asking, RatingConfig
from diffexpo.data.rows import Sample
from diffexpo.online.loop import Ranking
from diffexpo.rewards.mixture import mix_rewards
from tests.rows import sample_row

# Of three prompts: agreed; disputed by far between images 0 and 2; disputed a little between 1 and 2.
SCORES = {
    "sharp": [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 1.1]],
    "true": [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.0, 1.1, 1.0]],
}
WEIGHTS = {"sharp": 1.0, "true": 1.0}
GROUPS = [
    [
        sample_row(
            f"{number}-{image}",
            f"prompt {number}",
            rewards={name: SCORES[name][number][image] for name in SCORES},
        )
        for image in range(3)
    ]
    for number in range(3)
]
RANKING = Ranking(
    judge="both",
    mix=lambda scores: mix_rewards(scores, WEIGHTS, "zscore"),
    check=lambda scores: None,
    dominance=None,
    uncertainty=None,
)


def asking(couples: str, share: float) -> Asking:
    return Asking("quality", 3, share, couples, 0.5, RatingConfig())  # type: ignore[arg-type]


def chosen(couples: str, share: float, groups: list[list[Sample]] = GROUPS) -> dict[int, tuple[int, int]]:
    return choose_couples(asking(couples, share), groups, (0, 1), RANKING, WEIGHTS)


def test_disputed_couples_of_the_prompts_that_are_disputed_most() -> None:
    assert chosen("disputed", 1 / 3) == {1: (0, 2)}
    assert chosen("disputed", 2 / 3) == {1: (0, 2), 2: (1, 2)}
    assert set(chosen("disputed", 1.0)) == {0, 1, 2}


def test_a_negative_weight_turns_an_order_around() -> None:
    turned = choose_couples(asking("disputed", 1 / 3), GROUPS, (0, 1), RANKING, {"sharp": 1.0, "true": -1.0})
    assert turned == {0: (0, 2)}


def test_a_prompt_that_cannot_be_ranked_gets_a_couple_by_key() -> None:
    broken = [
        [sample_row(f"{n}-{i}", f"prompt {n}", rewards=dict.fromkeys(SCORES, np.nan)) for i in range(3)]
        for n in range(2)
    ]
    found = chosen("disputed", 1.0, broken)
    assert set(found) == {0, 1} and all(a != b for a, b in found.values())


def test_extremes_are_best_and_worst() -> None:
    assert chosen("extremes", 1.0)[0] == (2, 0)
