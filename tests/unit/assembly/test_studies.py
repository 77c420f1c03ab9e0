"""A study from its protocol to its report, with rules in place of people; and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffexpo.assembly.studies import new_study, report_study
from diffexpo.errors import ConfigError, DataError, MissingError, StoreError
from diffexpo.labelling.book import Book
from tests.raters import answer_all, careful, careless, join, png


def folder_of_images(folder: Path, seed: int, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("".join(f"a prompt {number}\n" for number in range(count)))
    for number in range(count):
        (folder / f"{number:05d}.png").write_bytes(png(1000 * seed + number))
    return folder


QUIET = {"checks_every": 4, "repeats_every": 6, "exclude": {"seconds_below": 0}}


def given(root: Path, models: int = 3, **more: object) -> dict[str, object]:
    found = {f"model{n}": str(folder_of_images(root / f"images{n}", n)) for n in range(models)}
    return {"name": "four models", "models": found, "rating": QUIET, "bootstrap": 300, **more}


def test_a_study_from_protocol_to_report(tmp_path: Path) -> None:
    study = tmp_path / "study"
    lines = new_study(study, None, given(tmp_path, votes=4, raters=5, questions=["aesthetics", "quality"]))
    assert lines[0] == "6 prompts, 18 pairs, 2 questions, 4 votes each"
    assert lines[1] == "144 answers in all, 29 for each of 5 raters, and checks"
    with Book(study) as book:
        # Who answers what is decided by chance, so only raters who never err give the same ranks every time.
        for number in range(4):
            answer_all(book, join(book, f"r{number}")[0], careful("model0"))
        answer_all(book, join(book, "careless")[0], careless(9))
    report = report_study(study)
    numbers = json.loads((study / "report.json").read_text())
    rows = [row for row in pq.read_table(study / "votes.parquet").to_pylist() if row["kind"] == "vote"]
    counted = [row for row in rows if not row["is_left_out"] and row["answer"] != "skip"]
    assert numbers["votes"] == len(counted) and len(numbers["comparisons"]) == 6
    for one in numbers["comparisons"]:
        own = [
            row
            for row in counted
            if row["question"] == one["question"] and {row["a"], row["b"]} == {one["first"], one["second"]}
        ]
        wins = sum(row["answer"] in "ab" and row[row["answer"]] == one["first"] for row in own)
        assert (one["wins"], one["losses"]) == (wins, len(own) - wins)
        assert (
            one["rate"] == pytest.approx(wins / len(own), abs=1e-9)
            and one["low"] <= one["rate"] <= one["high"]
        )
    best = [one for one in numbers["comparisons"] if one["first"] == "model0"]
    assert all(one["rate"] > 0.6 for one in best) and len(best) == 4
    strongest = numbers["strengths"]["model0"]["quality"]
    assert strongest["best"] == strongest["worst"] == 1 and strongest["against_average"][1] > 0.5
    text = report.read_text()
    for part in (
        "## Win rates",
        "## Strengths",
        "Krippendorff's alpha",
        "## Data sheet",
        "| model0 against model1 |",
    ):
        assert part in text
    assert "r0" not in text and "careless" not in text, "raters have no names in the report"


def test_against_one_model_and_some_prompts(tmp_path: Path) -> None:
    lines = new_study(
        tmp_path / "study", None, given(tmp_path, against="model1", prompts=2, votes=1, raters=1)
    )
    assert lines[0] == "2 prompts, 4 pairs, 3 questions, 1 votes each"
    with Book(tmp_path / "study") as book:
        couples = {(item.name_a, item.name_b) for item in book.items(kind="vote")}
    assert couples == {("model0", "model1"), ("model2", "model1")}


def test_images_are_written_anew_under_names_that_tell_nothing(tmp_path: Path) -> None:
    settings = given(tmp_path, models=2)
    out = io.BytesIO()
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("parameters", "model: secret-model")
    Image.new("RGB", (8, 8), "red").save(out, "PNG", pnginfo=told)
    (tmp_path / "images0" / "00000.png").write_bytes(out.getvalue())
    new_study(tmp_path / "study", None, settings)
    for path in (tmp_path / "study" / "images").iterdir():
        assert b"secret" not in path.read_bytes() and "model" not in path.name


def test_a_protocol_may_be_a_file_and_is_fixed(tmp_path: Path) -> None:
    settings = given(tmp_path, models=2)
    file = tmp_path / "protocol.yaml"
    file.write_text(json.dumps(settings))
    study = tmp_path / "study"
    new_study(study, file, {"votes": 1, "raters": 2})
    with pytest.raises(ConfigError, match="holds a study, whose protocol is fixed"):
        new_study(study, file, {})
    with pytest.raises(DataError, match="no votes that count; serve it first"):
        report_study(study)
    with Book(study) as book:
        answer_all(book, join(book, "ann")[0], careful("model0"))
    report_study(study)
    protocol = study / "protocol.yaml"
    protocol.write_text(protocol.read_text().replace("checks_below: 0.7", "checks_below: 0.1"))
    with pytest.raises(ConfigError, match="is not the protocol that the study began with"):
        report_study(study)


def test_images_that_were_changed_in_between_are_refused(tmp_path: Path) -> None:
    study = tmp_path / "study"
    new_study(study, None, given(tmp_path, models=2, votes=1, raters=1))
    with Book(study) as book:
        answer_all(book, join(book, "ann")[0], careful("model0"))
        book.image_path(book.items()[0].image_a).write_bytes(png(1))
    with pytest.raises(StoreError, match="has changed"):
        report_study(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"one": "nowhere", "two": "runs/x:base"}}, "neither a folder of images nor RUN:VERSION"),
        ({"models": {"one": "x"}}, "models = "),
        ({"against": "model9"}, "expected one of the models, model0, model1"),
        ({"votes": 3, "raters": 2}, "raters = 2 with votes = 3"),
        ({"votes": 0}, "votes = 0"),
        ({"questions": ["quality", "quality"]}, "holds a question twice"),
        ({"questions": ["beauty"]}, "questions.0 = 'beauty'"),
        ({"prompts": 7}, "the models share 6"),
        ({"ratings": {}}, "ratings is not a setting of a study.*Did you mean rating"),
        ({"name": None}, "name = None"),
    ],
)
def test_wrong_protocols_are_explained(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, MissingError), match=message):
        new_study(tmp_path / "study", None, given(tmp_path, models=2) | change)
    assert not (tmp_path / "study").exists()


def test_folders_without_what_is_needed_are_explained(tmp_path: Path) -> None:
    settings = given(tmp_path, models=2)
    (tmp_path / "images1" / "00003.png").unlink()
    with pytest.raises(MissingError, match=r"00003\.png does not exist; it is the image of 'a prompt 3'"):
        new_study(tmp_path / "study", None, settings)
    (tmp_path / "images1" / "00003.png").write_bytes(b"none")
    with pytest.raises(DataError, match="is no image that can be read"):
        new_study(tmp_path / "study", None, settings)
    (tmp_path / "images1" / "prompts.txt").write_text("x\nx\n")
    with pytest.raises(DataError, match="twice"):
        new_study(tmp_path / "study", None, settings)
    (tmp_path / "images1" / "prompts.txt").write_text("another\n")
    with pytest.raises(DataError, match="share no prompt"):
        new_study(tmp_path / "study", None, settings)
    (tmp_path / "images1" / "prompts.txt").unlink()
    with pytest.raises(MissingError, match="expected a prompt a line"):
        new_study(tmp_path / "study", None, settings)
    with pytest.raises(MissingError, match="has nothing to rate"):
        report_study(tmp_path)


def test_models_that_change_after_the_study_began_are_told(tmp_path: Path) -> None:
    """The study has copies, so its votes stand; whoever reads the report knows that the model is another one now."""
    study = tmp_path / "study"
    new_study(study, None, given(tmp_path, models=2, votes=1, raters=1, questions=["quality"]))
    with Book(study) as book:
        answer_all(book, join(book, "ann")[0], careful("model0"))
    said: list[str] = []
    report_study(study, said.append)
    assert said == []
    before = (study / "report.json").read_text()
    (tmp_path / "images0" / "00002.png").write_bytes(png(77))
    (tmp_path / "images1" / "00001.png").unlink()
    report_study(study, said.append)
    assert (
        len(said) == 2
        and "the images of model0 in" in said[0]
        and "no longer those that were shown" in said[0]
    )
    assert "the images of model1 in" in said[1] and "are gone" in said[1]
    assert (study / "report.json").read_text() == before


def test_a_run_without_images_is_explained(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "eval" / "pairs").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("name: x\n")
    with pytest.raises(MissingError, match="eval/base does not exist; evaluations there: pairs"):
        new_study(
            tmp_path / "study", None, {"name": "x", "models": {"a": f"{run_dir}:base", "b": str(tmp_path)}}
        )
    assert not (tmp_path / "study").exists()


def test_fewer_raters_than_votes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each vote on a pair comes from another person"):
        new_study(tmp_path / "study", None, given(tmp_path, votes=3, raters=2))
