"""People as a judge: what they say of a part of a collection's prompts becomes pairs, beside those of
rewards.

    margin = (votes for - votes against) / votes,   agreement = votes for / votes

After a tournament (`labelling/tournaments.py`) P, the probability that the best image is better than the
worst, stands for both: margin = 2 P - 1, agreement = P.

A prompt has a winner where more votes prefer it than prefer the other image (margin > 0) and at least
`min_agreement` of all votes do; a tie and "neither" are votes for nobody. Kept pairs weigh alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffexpo.data.rows import Sample
from diffexpo.online.pairing import Paired, pair_of_group

HUMAN = "human"
"""`source` of pairs that people made."""


@dataclass(frozen=True)
class Said:
    """What people said of two images of a prompt, by their places in its group.

    `wins` (first, second) and `ties` count the votes of raters who are not left out. After a tournament the
    couple is its best and its worst image, `wins` counts votes for the best and for all others, and
    `probability` says how sure it is that the first is the better one.
    """

    couple: tuple[int, int]
    wins: tuple[int, int]
    ties: int
    probability: float | None = None

    @property
    def votes(self) -> int:
        """All votes."""
        return sum(self.wins) + self.ties

    @property
    def sides(self) -> tuple[int, int]:
        """Places of the winner and the loser, if there are more votes for one of them."""
        if self.probability is not None:
            return self.couple
        return self.couple if self.wins[0] > self.wins[1] else (self.couple[1], self.couple[0])

    @property
    def margin(self) -> float:
        """>= 0, 0 where neither has more votes; (2, 1) and no tie give 1/3; 2 probability - 1 after a
        tournament."""
        if self.probability is not None:
            return 2 * self.probability - 1
        return abs(self.wins[0] - self.wins[1]) / self.votes if self.votes else 0.0

    @property
    def agreement(self) -> float:
        """Share of the votes that prefer the image with more of them; the probability after a tournament."""
        if self.probability is not None:
            return self.probability
        return max(self.wins) / self.votes if self.votes else 0.0


@dataclass(frozen=True)
class AskPeople:
    """How people are asked.

    `ask(groups, iteration)` gives what they said, by number of the prompt's group, or raises a WaitingError
    while votes are missing. `judge` is what pairs name as who preferred.
    """

    judge: str
    min_agreement: float
    ask: Callable[[Sequence[Sequence[Sample]], int], Mapping[int, Said]]


def add_people(
    paired: Paired,
    people: AskPeople,
    groups: Sequence[Sequence[Sample]],
    said: Mapping[int, Said],
    name: tuple[int, int],
) -> None:
    """Add the pairs that people decided; `name` is the run's seed and the iteration."""
    paired.asked = len(said)
    for index, answers in sorted(said.items()):
        if answers.margin == 0.0:
            paired.people_tie += 1
        elif answers.agreement < people.min_agreement:
            paired.people_disagree += 1
        else:
            samples = groups[index]
            paired.winner_with_negative += bool(samples[answers.sides[0]].negative_prompt)
            pair = pair_of_group(
                samples,
                answers.sides,
                (*name, index),
                judge=people.judge,
                margin=answers.margin,
                source=HUMAN,
                votes=answers.votes,
                agreement=answers.agreement,
            )
            paired.pairs.append(pair)
