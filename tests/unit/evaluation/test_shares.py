"""Shares of right images: counts by hand, groups of prompts, and what the report says of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffexpo.evaluation.records import SuiteResult, load_run, save_suite
from diffexpo.evaluation.report import write_report
from diffexpo.evaluation.shares import share_judge, share_rows
from diffexpo.evaluation.summary import summarise
from diffexpo.evaluation.verdict import give_verdict
from diffexpo.types import Prompt
from tests.unit.evaluation.synthetic_run import make_config, make_run, make_suite

BEFORE = np.array([0, 0, 0, 1, 1, 1, 0, 1], dtype=float)
AFTER = np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=float)


def suite(name: str, scores: np.ndarray, prompts: tuple[Prompt, ...] | None = None) -> SuiteResult:
    made = make_suite(name, shift=0.0, count=len(scores))
    prompts = prompts or tuple(
        Prompt(f"p{i}", f"text {i}", category="ab"[i % 2], attributes={"seen": "yes" if i < 4 else "no"})
        for i in range(len(scores))
    )
    return replace(made, prompts=prompts, scores={"correct": scores}, roles={"correct": "heldout"}, vendi={})


def rows_of(before: np.ndarray, after: np.ndarray) -> dict[str, tuple[float, float, int, int]]:
    found = share_rows(
        {"base": suite("base", before), "iteration-2": suite("iteration-2", after)},
        "correct",
        "iteration-2",
        resamples=200,
        seed=0,
    )
    return {row.group: (row.shares["base"], row.change[0], row.repaired, row.broken) for row in found}


def test_shares_and_changes_are_counted_in_each_group() -> None:
    assert rows_of(BEFORE, AFTER) == {
        "all": (0.5, 0.25, 3, 1),
        "a": (0.25, 0.25, 2, 1),
        "b": (0.75, 0.25, 1, 0),
        "seen: yes": (0.25, 0.5, 2, 0),
        "seen: no": (0.75, 0.0, 1, 1),
    }


def test_images_that_were_not_scored_in_both_are_left_out() -> None:
    before, after = BEFORE.copy(), AFTER.copy()
    before[0], after[3] = np.nan, np.nan
    assert rows_of(before, after)["all"] == (0.5, pytest.approx(1 / 6), 2, 1)


def test_prompts_without_categories_make_one_group() -> None:
    plain = tuple(Prompt(f"p{i}", f"text {i}") for i in range(len(BEFORE)))
    suites = {name: suite(name, scores, plain) for name, scores in (("base", BEFORE), ("iteration-1", AFTER))}
    found = share_rows(suites, "correct", "iteration-1", resamples=200, seed=0)
    assert [row.group for row in found] == ["all"] and found[0].num_prompts == 8


def test_only_a_held_out_judge_of_right_and_wrong_counts() -> None:
    judges = [{"name": "taste", "type": "clip"}, {"name": "correct", "type": "scene_correct"}]
    config = {"evaluation": {"judges": judges}}
    assert share_judge(config, {"taste": "heldout", "correct": "heldout"}) == "correct"
    assert share_judge(config, {"taste": "heldout", "correct": "train"}) is None
    assert share_judge({}, {"correct": "heldout"}) is None


def test_the_report_leads_with_the_share_that_is_right(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    assert summarise(load_run(run_dir)).shares == []
    record = load_run(run_dir)
    judges = [{"name": "correct", "type": "scene_correct", "path": "scenes:checker_heldout"}]
    record.config["evaluation"] = {**make_config()["evaluation"], "judges": judges}
    for name in list(record.suites):
        scores = BEFORE if name == "base" else AFTER
        record.suites[name] = suite(name, scores)
    summary = summarise(record)
    verdict = give_verdict(summary)
    assert verdict.tiles[0].value == "50.0% \u2192 75.0%"
    assert verdict.sentences[0].startswith("Entirely right under correct: 50.0% of the base's images, 75.0%")
    assert "3 repaired, 1 broken" in verdict.sentences[0]
    assert "Entirely right, by kind" not in write_report(run_dir).read_text()


def test_nothing_but_ties_is_said_to_be_that(tmp_path: Path) -> None:
    record = load_run(make_run(tmp_path / "run"))
    for name in list(record.suites):
        record.suites[name] = suite(name, BEFORE)
    (tie,) = [text for text in give_verdict(summarise(record)).sentences if "tie:" in text]
    assert tie == "Every comparison is a tie: to this judge the images of both are equally good."


def test_a_kind_of_one_prompt_has_no_interval_on_the_page(tmp_path: Path) -> None:
    alone = tuple(Prompt(f"p{i}", f"text {i}", category="b" if i else "alone") for i in range(len(BEFORE)))
    run_dir = make_run(tmp_path / "run")
    judges = [{"name": "correct", "type": "scene_correct", "path": "scenes:checker_heldout"}]
    config = make_config() | {"evaluation": {**make_config()["evaluation"], "judges": judges}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for folder in (run_dir / "eval").iterdir():
        shutil.rmtree(folder)
    for name, scores in {"base": BEFORE, "iteration-3": AFTER}.items():
        save_suite(suite(name, scores, alone), run_dir / "eval" / name)
    page = write_report(run_dir).read_text(encoding="utf-8")
    (row,) = [line for line in page.split("<tr>") if line.startswith("<td>alone</td>")]
    assert "+100.0" in row and "one prompt, no interval" in row and "nan" not in row
