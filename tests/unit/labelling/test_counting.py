"""Votes counted against an independent count, and careless raters found among careful ones."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

from diffexpo.config.people import CareConfig, RatingConfig
from diffexpo.labelling.counting import Verdict, left_out, rater_reports, verdicts
from tests.raters import answer_all, careful, careless, join, make_book


def test_verdicts_are_what_was_answered(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=12, wanted=5)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    generator = random.Random(3)
    for number in range(5):
        rater, _ = join(book, f"r{number}")

        def judge(left: str, right: str, kind: str) -> str:
            return generator.choice(["left", "right", "tie", "neither", "skip"])

        answer_all(book, rater, judge)
    for vote in book.votes():
        side = {"left": "a" if vote.is_a_left else "b", "right": "b" if vote.is_a_left else "a"}
        given[vote.item][side.get(vote.answer, vote.answer)] += 1
    for verdict in verdicts(book):
        counts = given[verdict.item.item]
        assert (verdict.wins_a, verdict.wins_b) == (counts["a"], counts["b"])
        assert (verdict.ties, verdict.skips) == (counts["tie"] + counts["neither"], counts["skip"])
        assert verdict.votes == sum(counts.values()) - counts["skip"]
        if verdict.votes:
            assert verdict.margin == (counts["a"] - counts["b"]) / verdict.votes
            assert verdict.agreement == max(counts["a"], counts["b"], verdict.ties) / verdict.votes
        assert verdict.is_contradicted == (counts["a"] > 0 and counts["b"] > 0)


def test_a_question_without_votes_has_no_winner(tmp_path: Path) -> None:
    (verdict, *_) = verdicts(make_book(tmp_path))
    assert verdict == Verdict(verdict.item) and (verdict.margin, verdict.agreement) == (0.0, 0.0)


def test_three_careless_raters_among_ten_are_found(tmp_path: Path) -> None:
    # Rules answer at once, so the rule on time is off.
    rating = RatingConfig(checks_every=4, repeats_every=9, exclude=CareConfig(min_checks=5, seconds_below=0))
    book = make_book(tmp_path, pairs=60, wanted=10, rating=rating)
    bad = set()
    for number in range(10):
        rater, _ = join(book, f"r{number}")
        is_bad = number in (2, 5, 7)
        answer_all(book, rater, careless(number) if is_bad else careful("one", noise=0.1, seed=number))
        bad |= {rater.rater} if is_bad else set()
    assert left_out(book) == bad
    reports = {report.rater: report for report in rater_reports(book)}
    careful_agreement = min(report.agreement for rater, report in reports.items() if rater not in bad)
    assert careful_agreement > max(reports[rater].agreement for rater in bad)
    assert all("attention checks" in reports[rater].reasons[0] for rater in bad)
    with_all, without = verdicts(book), verdicts(book, without=left_out(book))
    assert sum(verdict.votes for verdict in with_all) - sum(verdict.votes for verdict in without) == sum(
        reports[rater].answers for rater in bad
    )
    assert all(verdict.margin > 0 for verdict in without)


def test_too_fast_answers_are_left_out(tmp_path: Path) -> None:
    rating = RatingConfig(checks_every=0, repeats_every=0, exclude=CareConfig(seconds_below=5.0))
    book = make_book(tmp_path, pairs=12, wanted=1, rating=rating)
    rater, _ = join(book, "fast")
    answer_all(book, rater, careful("one"))
    (report,) = rater_reports(book)
    assert report.is_left_out and "took less than" in report.reasons[0]
