"""What the votes say: of each pair, who is preferred and how much people agree; of each rater, how
careful."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from diffexpo.labelling.book import CHECK, COUNTED, REPEAT, VOTE, Book, Item, Rater, Vote

MIN_TIMED = 10
"""Answers that a rater must have given before their pace can count against them."""


@dataclass(frozen=True)
class RaterReport:
    """How careful a rater was; shares are in [0, 1], None where there is nothing to take one of.

    `left_share` is of the answers left or right; `agreement` is the share of answers with which another
    rater's answer to the same question agrees, over all couples of answers.
    """

    rater: int
    name: str
    answers: int
    skipped: int
    checks: int
    checks_right: int
    repeats: int
    repeats_same: int
    seconds: float | None
    left_share: float | None
    agreement: float | None
    reasons: tuple[str, ...] = ()

    @property
    def is_left_out(self) -> bool:
        """Whether the rule that was fixed beforehand leaves the rater's answers out."""
        return bool(self.reasons)


@dataclass(frozen=True)
class Verdict:
    """The answers to one question: `wins_a`, `wins_b`, `ties` (neither counts as one), `skips`."""

    item: Item
    wins_a: int = 0
    wins_b: int = 0
    ties: int = 0
    skips: int = 0

    @property
    def votes(self) -> int:
        """Answers that count."""
        return self.wins_a + self.wins_b + self.ties

    @property
    def margin(self) -> float:
        """(wins of a - wins of b) / votes, in [-1, 1]; 0 without votes."""
        return (self.wins_a - self.wins_b) / self.votes if self.votes else 0.0

    @property
    def agreement(self) -> float:
        """Share of the most frequent of the three answers a, b and tie; 0 without votes."""
        return max(self.wins_a, self.wins_b, self.ties) / self.votes if self.votes else 0.0

    @property
    def is_contradicted(self) -> bool:
        """Whether some preferred a and others b."""
        return min(self.wins_a, self.wins_b) > 0


def rater_reports(book: Book) -> list[RaterReport]:
    """Every rater, by the rule of the book on whose answers are left out."""
    rule, votes = book.fact("rating")["exclude"], book.votes()
    agreement = _agreement(votes)
    of_rater: dict[int, list[Vote]] = defaultdict(list)
    for vote in votes:
        of_rater[vote.rater].append(vote)
    return [
        _report(rater, of_rater[rater.rater], rule, agreement.get(rater.rater)) for rater in book.raters()
    ]


def _report(
    rater: Rater, own: Sequence[Vote], rule: Mapping[str, float], agreement: float | None
) -> RaterReport:
    given, checks = _given(own), _checks(own)
    first = {vote.item: vote.preference for vote in own if vote.kind == VOTE}
    repeats = [vote for vote in own if vote.kind == REPEAT]
    seconds = [vote.seconds for vote in given if vote.seconds is not None]
    sides = [vote.answer for vote in given if vote.answer in ("left", "right")]
    return RaterReport(
        rater=rater.rater,
        name=rater.name,
        answers=len(given),
        skipped=sum(vote.answer == "skip" for vote in own if vote.kind == VOTE),
        checks=len(checks),
        checks_right=sum(vote.preference == 1.0 for vote in checks),
        repeats=len(repeats),
        repeats_same=sum(first.get(vote.item) == vote.preference for vote in repeats),
        seconds=median(seconds) if seconds else None,
        left_share=sides.count("left") / len(sides) if sides else None,
        agreement=agreement,
        reasons=reasons_of(own, rule),
    )


def reasons_of(own: Sequence[Vote], rule: Mapping[str, float]) -> tuple[str, ...]:
    """Why a rule (`CareConfig`) leaves out a rater of these answers; none: it does not."""
    reasons, checks = [], _checks(own)
    right = sum(vote.preference == 1.0 for vote in checks)
    if len(checks) >= rule["min_checks"] and right < rule["checks_below"] * len(checks):
        reasons.append(f"{right} of {len(checks)} attention checks answered rightly")
    seconds = [vote.seconds for vote in _given(own) if vote.seconds is not None]
    if len(seconds) >= MIN_TIMED and median(seconds) < rule["seconds_below"]:
        reasons.append(f"half of the answers took less than {median(seconds):.2f} s")
    return tuple(reasons)


def left_out(book: Book) -> frozenset[int]:
    """Raters whose answers the rule leaves out."""
    return frozenset(report.rater for report in rater_reports(book) if report.is_left_out)


def _given(own: Sequence[Vote]) -> list[Vote]:
    return [vote for vote in own if vote.kind == VOTE and vote.answer in COUNTED]


def _checks(own: Sequence[Vote]) -> list[Vote]:
    return [vote for vote in own if vote.kind == CHECK]


def verdicts(book: Book, batch: int | None = None, without: frozenset[int] = frozenset()) -> list[Verdict]:
    """The answers to each question of a batch, or of all, without those of some raters; repeats and checks
    are no answers."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    place = {1.0: 0, 0.0: 1, 0.5: 2, None: 3}
    for vote in book.votes(batch):
        if vote.kind == VOTE and vote.rater not in without:
            counts[vote.item][place[vote.preference]] += 1
    return [Verdict(item, *counts[item.item]) for item in book.items(batch, VOTE)]


def _agreement(votes: Sequence[Vote]) -> dict[int, float]:
    """Share of couples (own answer, another rater's answer to the same question) that are the same."""
    given = [vote for vote in votes if vote.kind == VOTE and vote.answer in COUNTED]
    answers, alike = Counter(vote.item for vote in given), Counter((v.item, v.preference) for v in given)
    same: Counter[int] = Counter()
    couples: Counter[int] = Counter()
    for vote in given:  # a rater answers a question once
        same[vote.rater] += alike[vote.item, vote.preference] - 1
        couples[vote.rater] += answers[vote.item] - 1
    return {rater: same[rater] / count for rater, count in couples.items() if count}
