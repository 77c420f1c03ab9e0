"""What a rater is asked next: balanced sides, shared work, checks, repeats, and no more votes than wanted."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from diffexpo.config.people import CareConfig, RatingConfig
from diffexpo.errors import ConfigError
from diffexpo.labelling import asking
from diffexpo.labelling.asking import answer, missing_votes, open_tasks, pages_of, progress, undo
from diffexpo.labelling.book import VOTE
from diffexpo.labelling.counting import left_out
from tests.raters import PLAIN, answer_all, careful, join, make_book


def test_every_question_gets_the_votes_that_are_wanted_and_no_more(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=7, questions=("quality", "aesthetics"), wanted=3)
    assert missing_votes(book) == 42
    done = [answer_all(book, join(book, f"r{number}")[0], careful("one")) for number in range(5)]
    counts = Counter(vote.item for vote in book.votes())
    assert set(counts.values()) == {3} and len(counts) == 14 and missing_votes(book) == 0
    assert sum(done) == 42 and done[:3] == [14, 14, 14]


def test_sides_of_a_pair_are_balanced_and_stay_while_it_is_asked_about(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=9, questions=("quality", "alignment", "aesthetics"), wanted=6)
    for number in range(6):
        answer_all(book, join(book, f"r{number}")[0], careful("one"))
    sides = Counter((vote.item[:11], vote.is_a_left) for vote in book.votes())
    assert all(sides[item.pair, True] == 9 for item in book.items()), "3 of 6 raters, 3 questions each"
    of_rater = {(vote.rater, vote.item[:11]): set() for vote in book.votes()}
    for vote in book.votes():
        of_rater[vote.rater, vote.item[:11]].add(vote.is_a_left)
    assert all(len(seen) == 1 for seen in of_rater.values())
    # The first image of a couple is not on one side for all pairs at the start.
    first = {vote.item[:11]: vote.is_a_left for vote in book.votes() if vote.rater == 1}
    assert len(set(first.values())) == 2


def test_the_questions_on_a_pair_come_one_after_another_in_an_order_of_the_raters_own(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=8, questions=("quality", "alignment"), wanted=2)
    orders = []
    for name in ("ann", "bob"):
        rater, _ = join(book, name)
        answer_all(book, rater, careful("one"))
        pairs = [vote.item[:11] for vote in book.votes() if vote.rater == rater.rater]
        assert pairs[::2] == pairs[1::2] and len(set(pairs)) == 8
        orders.append(pairs)
    assert orders[0] != orders[1]


def test_checks_and_repeats_come_as_often_as_they_should(tmp_path: Path) -> None:
    rating = RatingConfig(checks_every=5, repeats_every=7, exclude=PLAIN.exclude)
    book = make_book(tmp_path, pairs=40, wanted=1, rating=rating)
    rater, _ = join(book, "ann")
    answer_all(book, rater, careful("one"))
    votes = book.votes()
    kinds = Counter(vote.kind for vote in votes)
    total = sum(kinds.values())
    # One check is made for every five pairs, and none is asked twice.
    assert kinds["vote"] == 40 and kinds["check"] == 8 and abs(kinds["repeat"] - total / 7) <= 1
    assert missing_votes(book) == 0, "checks and repeats are no votes"
    by_kind = {kind: {vote.item: vote for vote in votes if vote.kind == kind} for kind in kinds}
    for item, again in by_kind["repeat"].items():
        first = by_kind["vote"][item]
        assert again.is_a_left != first.is_a_left and again.place > first.place
        assert again.preference == first.preference
    assert {vote.preference for vote in by_kind["check"].values()} == {1.0}


def test_a_task_is_reserved_for_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = make_book(tmp_path, pairs=1, wanted=1)
    (ann, _), (bob, _) = join(book, "ann"), join(book, "bob")
    (task,) = open_tasks(book, ann.rater)
    assert open_tasks(book, bob.rater) == [], "the only pair is before Ann's eyes"
    monkeypatch.setattr(asking, "RESERVED_S", -1.0)
    assert len(open_tasks(book, bob.rater)) == 1, "Ann has gone away"
    answer(book, ann.rater, task.task, "left")
    assert open_tasks(book, ann.rater) == []


def test_skipped_questions_are_asked_of_others(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=3, wanted=1)
    (ann, _), (bob, _) = join(book, "ann"), join(book, "bob")
    assert answer_all(book, ann, lambda left, right, kind: "skip") == 3
    assert missing_votes(book) == 3 and progress(book, ann.rater).left == 0
    assert answer_all(book, bob, careful("one")) == 3 and missing_votes(book) == 0


def test_votes_of_raters_who_are_left_out_are_asked_for_again(tmp_path: Path) -> None:
    rating = RatingConfig(checks_every=2, repeats_every=0, exclude=CareConfig(min_checks=3, seconds_below=0))
    book = make_book(tmp_path, pairs=6, wanted=1, rating=rating)
    bad, _ = join(book, "bad")
    answer_all(book, bad, lambda left, right, kind: "left" if left.endswith("(ruined)") else "right")
    assert left_out(book) == {bad.rater} and missing_votes(book, without=left_out(book)) == 6
    good, _ = join(book, "good")
    answer_all(book, good, careful("one"))
    assert missing_votes(book, without=left_out(book)) == 0


def test_a_clock_that_was_set_back_gives_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = make_book(tmp_path, pairs=2)
    rater, _ = join(book, "ann")
    (task, later) = open_tasks(book, rater.rater)
    now = time.time()
    monkeypatch.setattr(asking.time, "time", lambda: now - 3600)
    answer(book, rater.rater, task.task, "left")
    monkeypatch.undo()
    open_tasks(book, rater.rater)
    time.sleep(0.01)
    answer(book, rater.rater, later.task, "left")
    seconds = [vote.seconds for vote in book.votes()]
    assert seconds[0] is None and seconds[1] is not None and 0.01 <= seconds[1] < 60


def test_progress_counts_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    book = make_book(tmp_path, pairs=5)
    rater, _ = join(book, "ann")
    answer_all(book, rater, careful("one"), most=2)
    found = progress(book, rater.rater)
    assert (found.done, found.left, found.can_undo) == (2, 3, True)


def test_wrong_answers_are_refused(tmp_path: Path) -> None:
    book = make_book(tmp_path)
    rater, _ = join(book, "ann")
    (task, *_) = open_tasks(book, rater.rater)
    with pytest.raises(ConfigError, match="expected one of left, right, tie"):
        answer(book, rater.rater, task.task, "both")
    with pytest.raises(ConfigError, match="shown to this rater"):
        answer(book, rater.rater, 999, "left")
    assert answer(book, rater.rater, task.task, "left")
    assert not answer(book, rater.rater, task.task, "right")


def test_all_questions_on_a_pair_come_on_one_page(tmp_path: Path) -> None:
    """Also between checks and repeats; an undo takes the whole page back, and every question gets its votes."""
    rating = RatingConfig(checks_every=3, repeats_every=4, at_once=True, exclude=CareConfig(seconds_below=0))
    questions = ("aesthetics", "alignment", "quality")
    with make_book(tmp_path, pairs=4, questions=questions, wanted=2, rating=rating) as book:
        for name in ("ann", "bob"):
            rater, _ = join(book, name)
            pages = 0
            while shown := pages_of(open_tasks(book, rater.rater), at_once=True):
                page = shown[0]
                if page[0].kind == VOTE:
                    pages += 1
                    assert sorted(task.question for task in page) == list(questions)
                    assert len({(task.pair, task.left, task.right, task.prompt) for task in page}) == 1
                for task in page:
                    assert answer(book, rater.rater, task.task, "left")
                if pages == 2 and page[0].kind == VOTE:
                    assert undo(book, rater.rater)
                    again = pages_of(open_tasks(book, rater.rater), at_once=True)[0]
                    assert [task.task for task in again] == [task.task for task in page]
                    for task in again:
                        assert answer(book, rater.rater, task.task, "right")
            assert pages == 4
        given = Counter((vote.item, vote.kind) for vote in book.votes())
        assert {count for (_, kind), count in given.items() if kind == VOTE} == {2}
        assert {vote.kind for vote in book.votes()} == {"vote", "check", "repeat"}
