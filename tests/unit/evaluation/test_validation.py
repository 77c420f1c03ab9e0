"""What a report makes of validation scores: the iterate that it is about, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffexpo.data.store import Store
from diffexpo.evaluation.records import load_run
from diffexpo.evaluation.report import write_report
from diffexpo.evaluation.summary import summarise
from diffexpo.evaluation.verdict import give_verdict
from tests.unit.evaluation.synthetic_run import make_config, make_run

SCORES = {1: [0.0, 0.5, 0.25], 2: [1.0, 0.5, 0.75], 3: [0.5, 0.5, None]}


def validated(root: Path, *numbers: int, patience: int | None = None) -> Path:
    """The synthetic run of three iterations, some of them validated."""
    run_dir = make_run(root)
    config = make_config()
    config["explore"] |= {"keep": "best", "patience": patience}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for number in numbers:
        known = [score for score in SCORES[number] if score is not None]
        payload = {"mean": sum(known) / len(known), "judge": "chooses", "prompts": ["a", "b", "c"]}
        payload["scores"] = {"chooses": SCORES[number]}
        Store(run_dir / "store").write_manifest("validate", number, payload)
    return run_dir


def test_the_verdict_is_about_the_iterate_that_was_kept(tmp_path: Path) -> None:
    run_dir = validated(tmp_path, 1, 2, 3)
    summary = summarise(load_run(run_dir))
    assert summary.final == "iteration-2" and summary.is_finished
    found = summary.validation
    assert found is not None and found.means == {1: 0.25, 2: 0.75, 3: 0.5}
    assert [round(found.scores[number][0], 9) for number in (1, 2, 3)] == [0.25, 0.75, 0.5]
    low, high = found.scores[2][1:]
    assert 0.5 <= low < 0.75 < high <= 1.0
    sentences = " ".join(give_verdict(summary).sentences)
    assert "the images of EXPO 2" in sentences and "(0.750; the last one 0.500)" in sentences
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert 'id="fig-validation"' in page and "the iterate that was kept" in page
    assert "iteration 2 is kept" in page


@pytest.mark.parametrize(("patience", "finished"), [(None, False), (1, False)])
def test_a_run_in_which_more_iterates_may_come_is_not_finished(
    tmp_path: Path, patience: int | None, finished: bool
) -> None:
    summary = summarise(load_run(validated(tmp_path, 1, 2, patience=patience)))
    assert summary.final == "iteration-2" and summary.is_finished is finished


def test_a_run_that_ended_early_is_finished_and_says_why(tmp_path: Path) -> None:
    run_dir = validated(tmp_path, 1, 2, patience=1)
    worse = {"mean": 0.1, "judge": "chooses", "prompts": ["a", "b"], "scores": {"chooses": [0.1, 0.1]}}
    Store(run_dir / "store").write_manifest("validate", 2, worse)
    summary = summarise(load_run(run_dir))
    assert summary.final == "iteration-1" and summary.is_finished
    assert "ended after iteration 2 of 3, because 1 in a row" in " ".join(give_verdict(summary).sentences)


def test_without_validation_it_is_about_the_last_and_has_no_such_figure(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    summary = summarise(load_run(run_dir))
    assert summary.final == "iteration-3" and summary.validation is None and summary.is_finished
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "fig-validation" not in page and "about the last one, not about the best" in page


def test_a_damaged_manifest_is_a_note_on_the_page(tmp_path: Path) -> None:
    run_dir = validated(tmp_path, 1, 2, 3)
    (run_dir / "store" / "manifests" / "validate-0002.json").write_text("{", encoding="utf-8")
    record = load_run(run_dir)
    assert record.validations == {} and "validate-0002.json is damaged" in record.problems[0]
