"""`diffexpo label` and `diffexpo study` as a person types them."""

from __future__ import annotations

from pathlib import Path

from diffexpo.labelling.book import Book
from tests.commands import diffexpo
from tests.raters import answer_all, careful, join, make_book, png


def test_links_votes_out_and_in_again(tmp_path: Path) -> None:
    with make_book(tmp_path / "one", pairs=3, wanted=1) as book:
        answer_all(book, join(book, "Ann")[0], careful("one"))
    make_book(tmp_path / "two", pairs=3, wanted=1).close()
    made = diffexpo("label", "links", tmp_path / "one", "--raters", 2, "--name", "Bob", "--days", 7)
    assert [line.partition(":")[0] for line in made.out.splitlines()] == ["Bob", "rater-1", "rater-2"]
    assert made.out.count("http://127.0.0.1:8189/r/") == 3
    assert "has ended" in diffexpo("label", "links", tmp_path / "one", "--revoke", "Bob").out
    votes = tmp_path / "votes.csv"
    assert diffexpo("label", "export", tmp_path / "one", votes).out == f"3 answers: {votes}\n"
    assert "3 votes of 1 raters" in diffexpo("label", "import", tmp_path / "two", votes).out
    table = diffexpo("label", "status", tmp_path / "two").out
    assert "3 questions, 3 votes, 0 missing" in table and "(imported)" in table
    with Book(tmp_path / "two") as book:
        assert {vote.preference for vote in book.votes()} == {1.0}


def test_what_is_not_there_is_explained(tmp_path: Path) -> None:
    for arguments in (
        ("label", "status", tmp_path),
        ("study", "report", tmp_path),
        ("study", "serve", tmp_path),
    ):
        done = diffexpo(*arguments, check=False)
        assert done.code == 3 and "has nothing to rate" in done.message
    done = diffexpo("label", "status", tmp_path / "absent", check=False)
    assert done.code == 3 and "Nor is it the folder of a study" in done.message
    done = diffexpo("study", "new", tmp_path / "study", "--model", "base", check=False)
    assert done.code == 2 and "expected NAME=SOURCE" in done.message


def test_a_study_by_options(tmp_path: Path) -> None:
    models = []
    for name in ("base", "tuned"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "prompts.txt").write_text("a cat\na dog\n")
        for number in range(2):
            (folder / f"{number:05d}.png").write_bytes(png(number + 10 * (name == "base")))
        models += ["--model", f"{name}={folder}"]
    study = tmp_path / "study"
    options = ["--question", "quality", "--votes", 1, "--raters", 1]
    made = diffexpo("study", "new", study, *models, *options)
    assert "2 prompts, 2 pairs, 1 questions, 1 votes each" in made.out and "label links" in made.out
    with Book(study) as book:
        answer_all(book, join(book, "Ann")[0], careful("tuned"))
    done = diffexpo("study", "report", study)
    assert done.out == f"report: {study / 'report.md'}\n"
    assert "| base against tuned | 0.0%" in (study / "report.md").read_text()
