"""What votes buy, said before anybody is asked."""

from __future__ import annotations

from itertools import product

import pytest

from diffexpo.assembly.rating import vote_costs
from diffexpo.config.people import majority_right, votes_for
from diffexpo.errors import ConfigError


@pytest.mark.parametrize(("votes", "preference"), [(1, 0.6), (3, 0.75), (4, 0.75), (5, 0.9)])
def test_the_majority_against_all_outcomes(votes: int, preference: float) -> None:
    expected = 0.0
    for outcome in product((0, 1), repeat=votes):
        if sum(outcome) > votes / 2:
            expected += preference ** sum(outcome) * (1 - preference) ** (votes - sum(outcome))
    assert majority_right(votes, preference) == pytest.approx(expected, abs=1e-12)


def test_the_fewest_votes_for_a_certainty() -> None:
    assert votes_for(0.95, 0.75) == 9 and majority_right(7, 0.75) < 0.95 <= majority_right(9, 0.75)
    assert votes_for(0.6, 0.75) == 1 and votes_for(0.999, 0.51) is None


def test_the_table_names_the_wanted_certainty_and_a_tournament() -> None:
    rows = vote_costs(0.95, 0.75, 3)
    assert ("one pair, for 95%", "9", f"{majority_right(9, 0.75):.1%} right") in rows
    assert [votes for what, votes, _ in rows if what.startswith("a tournament of 3")] == ["2", "4", "8"]
    for certainty, preference in ((0.4, 0.75), (0.95, 0.5), (1.0, 0.75)):
        with pytest.raises(ConfigError, match="expected numbers above"):
            vote_costs(certainty, preference, 4)
