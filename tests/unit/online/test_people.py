"""What people said becomes pairs: winners, ties, contradictions, and the way of the stored rows."""

from __future__ import annotations

import pytest

from diffexpo.online.pairing import Paired
from diffexpo.online.people import AskPeople, Said, add_people
from tests.rows import sample_row

GROUPS = [
    [
        sample_row(f"{group}-{agent}-{index}", f"prompt {group}", agent)
        for agent in ("main", "exploration")
        for index in range(2)
    ]
    for group in range(5)
]


def paired(said: dict[int, Said], min_agreement: float = 0.5) -> Paired:
    found = Paired(len(GROUPS))
    add_people(found, AskPeople("human:quality", min_agreement, lambda groups, t: {}), GROUPS, said, (7, 1))
    return found


@pytest.mark.parametrize(
    ("wins", "ties", "margin", "agreement"),
    [
        ((3, 0), 0, 1.0, 1.0),
        ((2, 1), 0, 1 / 3, 2 / 3),
        ((1, 0), 2, 1 / 3, 1 / 3),
        ((1, 1), 1, 0.0, 1 / 3),
        ((0, 0), 0, 0.0, 0.0),
    ],
)
def test_margin_and_agreement(wins: tuple[int, int], ties: int, margin: float, agreement: float) -> None:
    said = Said((0, 2), wins, ties)
    assert said.margin == pytest.approx(margin, abs=1e-15) and said.agreement == pytest.approx(
        agreement, abs=1e-15
    )
    turned = Said((2, 0), wins[::-1], ties)
    assert (turned.margin, turned.agreement) == (said.margin, said.agreement)
    if margin:
        assert turned.sides == said.sides, "who won does not depend on who stands first"


def test_pairs_ties_and_contradictions_are_told_apart() -> None:
    said = {
        0: Said((0, 2), (3, 0), 0),
        1: Said((0, 3), (1, 2), 0),
        2: Said((1, 2), (1, 1), 1),
        3: Said((1, 3), (2, 1), 2),
    }
    found = paired(said)
    assert [(pair.winner_id, pair.loser_id) for pair in found.pairs] == [
        ("0-main-0", "0-exploration-0"),
        ("1-exploration-1", "1-main-0"),
    ]
    assert (found.asked, found.people_tie, found.people_disagree) == (4, 1, 1)
    first, second = found.pairs
    assert (first.votes, first.agreement, first.margin, first.source, first.judge) == (
        3,
        1.0,
        1.0,
        "human",
        "human:quality",
    )
    assert (second.agreement, second.margin) == (2 / 3, pytest.approx(1 / 3))
    assert {first.explored_id[:13], first.main_id[:6]} == {"0-exploration", "0-main"}
    assert found.metrics()["people/votes"] == 6 and found.metrics()["people/agreement"] == pytest.approx(
        5 / 6
    )
    assert "2 of 4 that people judged (1 ties, 1 too contradictory)" in found.describe()
    assert len(paired(said, 0.4).pairs) == 3 and len(paired(said, 1.0).pairs) == 1


def test_without_people_nothing_is_said_of_them() -> None:
    assert not [name for name in Paired(3).metrics() if name.startswith("people/")]
    assert "people" not in Paired(3).describe()
