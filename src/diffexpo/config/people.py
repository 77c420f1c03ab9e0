"""What people are asked, when a rater's answers are left out, and the protocol of a study. Imports without
torch."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from diffexpo.config.section import Count, Fraction, NotNegative, Section

Question = Literal["quality", "alignment", "aesthetics"]
QUESTIONS: dict[str, str] = {
    "quality": "Which image is better, all in all?",
    "alignment": "Which image fits the description better?",
    "aesthetics": "Which image is more beautiful?",
}
"""The three questions of the papers, as a rater reads them."""

CONSENT = (
    "You will see two images at a time and say which one you prefer. Kept are your answers, how long each "
    "took, and the name that your personal link was made for; exported answers carry a number instead of "
    "that name. No address and no other trait of yours is kept. You may stop at any time by closing this "
    "page, and ask whoever sent you the link to delete your answers."
)
"""What a rater agrees to before the first question."""


def majority_right(votes: int, preference: float) -> float:
    """Probability that more votes prefer the better image than the other.

        sum_{k > v/2} C(v, k) p^k (1 - p)^(v - k)

    Args:
        votes: v >= 1. preference: p, the probability that one vote prefers the better image.
    Returns:
        In [0, 1]; of 3 votes and 0.75 it is 0.84375.
    """
    return sum(
        math.comb(votes, right) * preference**right * (1 - preference) ** (votes - right)
        for right in range(votes // 2 + 1, votes + 1)
    )


def votes_for(certainty: float, preference: float, most: int = 999) -> int | None:
    """The fewest votes, an odd number, with which the majority is right so often; None: more than `most`."""
    odd = range(1, most + 1, 2)
    return next((votes for votes in odd if majority_right(votes, preference) >= certainty), None)


class CareConfig(Section):
    """When all answers of a rater are left out; fixed before the first answer."""

    min_checks: Count = 3
    """Attention checks that a rater must have answered before they can count against the answers."""
    checks_below: Fraction = 0.7
    """Answers are left out when less than this share of the attention checks was answered rightly."""
    seconds_below: NotNegative = 0.5
    """Answers are left out when their median took less than this, in seconds; 0 never leaves any out."""


class RatingConfig(Section):
    """How pairs of images are shown to people."""

    checks_every: int = Field(default=12, ge=0)
    """One of this many tasks is an attention check: an image against a ruined copy of it. 0: none."""
    repeats_every: int = Field(default=20, ge=0)
    """One of this many tasks is a pair that the rater has seen, with its sides exchanged; it measures how
    constant a rater is, and is no vote. 0: none."""
    at_once: bool = False
    """All questions on a pair stand on one page and are answered together; else one after another."""
    consent: str = CONSENT
    """Shown before the first question; a rater agrees to it."""
    exclude: CareConfig = CareConfig()
    """Whose answers are left out."""


@dataclass(frozen=True)
class Asking:
    """What people are asked of each collection of a run; the card of the reward documents each."""

    question: Question
    votes: int
    share: float
    couples: Literal["random", "extremes", "disputed", "tournament"]
    min_agreement: float
    rating: RatingConfig
    candidates: int = 2
    rounds: int = 1

    def num_prompts(self, prompts: int) -> int:
        """How many of a collection's prompts people judge."""
        return round(self.share * prompts)


class StudyConfig(Section):
    """The protocol of a study of several models, fixed before the first answer."""

    name: str
    """Name of the study; raters see it."""
    seed: int = 0
    """Names the order of pairs, their sides and the checks."""
    models: dict[str, str] = Field(min_length=2)
    """Name of each model, for the owner alone, and where its images are: RUN:VERSION, an evaluation in a
    run's folder (`runs/expo:base`, `runs/expo:iteration-3`), or a folder with `prompts.txt` and an image
    for each of its lines, `00000.png` and so on."""
    against: str | None = None
    """Model that every other one is compared with; null compares every couple of models."""
    questions: tuple[Question, ...] = Field(default=("aesthetics", "alignment", "quality"), min_length=1)
    """What is asked of each pair, one question after the other."""
    prompts: int | None = Field(default=None, ge=1)
    """How many prompts are shown, by keyed order; null takes all that the models share."""
    votes: Count = 3
    """Answers that each pair gets for each question; a skipped one is no answer."""
    raters: Count = 10
    """People who are to take part."""
    rating: RatingConfig = RatingConfig()
    """How pairs are shown."""
    bootstrap: Count = 10000
    """Resamples of prompts and raters for the 95% intervals."""
