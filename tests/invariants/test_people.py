"""People as judge of a run: it waits with its own exit code, goes on with their votes, and mixes them with rewards.

Rules stand in for people: what is tested is the way of the votes, not anybody's taste.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffexpo.data import Store
from diffexpo.labelling.book import Book
from tests.invariants.conftest import diffexpo, run_arguments, weights
from tests.raters import answer_all, join

HUMAN = [
    "--set",
    "rewards=[{type: human, question: alignment, votes: 2, rating: {checks_every: 0, repeats_every: 0, exclude: {seconds_below: 0}}}]",
    "--set",
    "explore.iterations=2",
]


def first_sample(left: str, right: str, kind: str) -> str:
    """Prefers the sample whose id comes first in the alphabet."""
    return "left" if left < right else "right"


def vote(run_dir: Path, *names: str) -> None:
    with Book(run_dir / "labels") as book:
        for name in names:
            answer_all(book, join(book, name)[0], first_sample)


@pytest.fixture(scope="module")
def waiting(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waits for people, whose folder holds what it printed."""
    run_dir = tmp_path_factory.mktemp("people") / "run"
    done = diffexpo(*run_arguments(world, run_dir), *HUMAN, check=False)
    assert done.code == 76, done.err
    (run_dir / "said.txt").write_text(done.err)
    return run_dir


def test_it_waits_and_says_how_to_serve_and_what_is_missing(waiting: Path) -> None:
    said = (waiting / "said.txt").read_text()
    assert "iteration 1 waits for people: 8 of 8 votes on 4 pairs are missing" in said
    assert f"diffexpo label serve {waiting}" in said and f"diffexpo run --resume {waiting}" in said
    assert "0 raters have links, but each pair needs the votes of 2" in said
    assert "Traceback" not in said and "error:" not in said
    assert json.loads((waiting / "status.json").read_text())["state"] == "waiting"


def test_it_goes_on_when_the_votes_are_in(waiting: Path) -> None:
    vote(waiting, "ann")
    done = diffexpo("run", "--resume", waiting, check=False)
    assert done.code == 76 and "4 of 8 votes on 4 pairs are missing" in done.err
    vote(waiting, "bob")
    diffexpo("run", "--resume", waiting)
    store = Store(waiting / "store", create=False)
    pairs = store.pairs(1)
    assert len(pairs) == 4 and store.verify() > 0
    for pair in pairs:
        assert (pair.judge, pair.source, pair.votes) == ("human:alignment", "human", 2)
        assert (pair.agreement, pair.margin) == (1.0, 1.0)
        assert pair.winner_id < pair.loser_id
        assert {pair.winner_agent, pair.loser_agent} == {"main", "exploration"}
        assert store.lineage(pair.pair_id).winner.sample_id == pair.winner_id
    assert store.is_complete("label", 1) and store.manifest("label", 1)["people/votes"] == 8
    assert len(weights(waiting)) == 2 and (waiting / "report.html").is_file()
    rows = [json.loads(line) for line in (waiting / "metrics.jsonl").read_text().splitlines()]
    (paired,) = [row for row in rows if row["phase"] == "pair"]
    report = (waiting / "report.html").read_text()
    assert (
        "What people say" in report
        and "<td>4</td><td>4</td><td>0</td><td>0</td><td>8</td><td>100.0%</td>" in report
    )
    assert (paired["people/asked"], paired["people/pairs"], paired["people/agreement"]) == (4, 4, 1.0)


def test_people_judge_a_part_and_rewards_the_rest(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    brightness = f"{{name: brightness, type: python, path: '{world}/rewards.py:brightness'}}"
    quiet = "rating: {checks_every: 0, repeats_every: 0, exclude: {seconds_below: 0}}"
    rewards = f"rewards=[{{type: human, votes: 1, share: 0.5, couples: extremes, {quiet}}}, {brightness}]"
    arguments = [*run_arguments(world, run_dir), "--set", rewards, "--set", "explore.iterations=2"]
    assert diffexpo(*arguments, check=False).code == 76
    with Book(run_dir / "labels") as book:
        asked = {name for item in book.items(kind="vote") for name in (item.name_a, item.name_b)}
        rater, _ = join(book, "ann")
        # Against the reward: the couples are its best and worst, and the person prefers the other one.
        scores = {row.sample_id: row.scores["brightness"] for row in Store(run_dir / "store").samples(1)}
        answer_all(book, rater, lambda left, right, kind: "left" if scores[left] < scores[right] else "right")
    # The server ends by itself, for every vote is in, and the run goes on.
    served = diffexpo("label", "serve", run_dir, "--port", "0", "--resume")
    assert "every vote is in" in served.out and f"report: {run_dir / 'report.html'}" in served.out
    pairs = Store(run_dir / "store", create=False).pairs(1)
    by_people = [pair for pair in pairs if pair.source == "human"]
    by_reward = [pair for pair in pairs if pair.source == "online"]
    assert len(by_people) == 2 and len(by_reward) == 2
    assert {name for pair in by_people for name in (pair.winner_id, pair.loser_id)} == asked
    assert all(scores[pair.winner_id] < scores[pair.loser_id] for pair in by_people)
    assert all(scores[pair.winner_id] > scores[pair.loser_id] and pair.votes is None for pair in by_reward)
    assert {pair.judge for pair in by_people} == {"human:quality"}
    assert "2 of 2 that people judged" in (run_dir / "log.txt").read_text()


def test_rating_a_run_that_asks_nobody_is_explained(truth: Path) -> None:
    assert "What people say" not in (truth / "report.html").read_text()
    done = diffexpo("label", "serve", truth, check=False)
    assert done.code == 3 and "has nothing to rate" in done.message and "type human" in done.message


def test_a_tournament_asks_round_by_round_and_ends_with_best_and_worst(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    quiet = "rating: {checks_every: 0, repeats_every: 0, exclude: {seconds_below: 0}}"
    human = f"{{type: human, votes: 1, couples: tournament, candidates: 3, rounds: 3, {quiet}}}"
    arguments = [
        *run_arguments(world, run_dir),
        "--set",
        f"rewards=[{human}]",
        "--set",
        "explore.iterations=2",
    ]
    done = diffexpo(*arguments, check=False)
    for asked in (4, 8, 12):
        assert done.code == 76 and f"4 of {asked} votes on {asked} pairs are missing" in done.err
        with Book(run_dir / "labels") as book:
            rater = join(book, f"rater {asked}")[0]
            answer_all(book, rater, first_sample)
        done = (
            diffexpo("run", "--resume", run_dir, "--stop-after", "pair-1", check=False)
            if asked == 12
            else diffexpo("run", "--resume", run_dir, check=False)
        )
    assert done.code == 0, done.err
    pairs = Store(run_dir / "store", create=False).pairs(1)
    with Book(run_dir / "labels") as book:
        couples = [(item.prompt_id, {item.name_a, item.name_b}) for item in book.items(kind="vote")]
    assert len(pairs) == 4 and all((pair.source, pair.votes) == ("human", 3) for pair in pairs)
    for pair in pairs:
        own = [couple for prompt, couple in couples if prompt == pair.prompt_id]
        field = set.union(*own)
        assert (
            len(own) == 3 and len(field) <= 3 and {pair.winner_id, pair.loser_id} <= field | {pair.loser_id}
        )
        # Who is first in the alphabet wins each vote, so nobody who met the winner was before it.
        assert all(pair.winner_id == min(couple) for couple in own if pair.winner_id in couple)
        assert pair.agreement is not None and pair.margin == pytest.approx(2 * pair.agreement - 1)
        assert 0.5 < pair.agreement < 1.0
