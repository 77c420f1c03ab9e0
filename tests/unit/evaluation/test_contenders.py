"""The table of contenders: its arithmetic against NumPy and what the report says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from diffexpo.evaluation.contenders import Contenders, Entry, compare_contenders, guidance_title
from diffexpo.evaluation.records import SuiteResult, load_run, save_suite
from diffexpo.evaluation.report import write_report
from diffexpo.evaluation.summary import summarise
from diffexpo.evaluation.verdict import give_verdict
from tests.unit.evaluation.synthetic_run import make_config, make_run, make_suite, write_lines

BASE = np.array([0, 0, 0, 1, 1, 1, 0, 1], dtype=float)
GUIDED = np.array([1, 0, 0, 1, 1, 1, 0, 1], dtype=float)
OTHER = np.array([1, 1, 0, 0, 1, 1, 0, 1], dtype=float)
RESULT = np.array([1, 1, 0, 1, 0, 1, 1, 1], dtype=float)


def suite(scores: np.ndarray, *, guidance: float = 1.0, judge: str = "correct") -> SuiteResult:
    made = make_suite("any", shift=0.0, count=len(scores))
    sampler = {"name": "dpmpp", "steps": 6, "guidance": guidance}
    return replace(made, scores={judge: scores}, roles={judge: "heldout"}, sampler=sampler)


def table(result: np.ndarray = RESULT, **changes: np.ndarray) -> Contenders:
    scores = {"base": BASE, "base-2.5": GUIDED, "other": OTHER} | changes
    entries = []
    for name, values in scores.items():
        drawn = suite(values, guidance=2.5 if name == "base-2.5" else 1.0)
        entries.append(Entry(name, name, drawn, 500.0, is_base=name.startswith("base")))
    entries.append(Entry("iteration-2", "EXPO 2", suite(result), 1000.0))
    found = compare_contenders(entries, "correct", is_share=True, resamples=4000, seed=3)
    assert found is not None
    return found


@pytest.mark.parametrize(("row", "scores"), [(0, BASE), (1, GUIDED), (2, OTHER)])
def test_every_number_is_what_numpy_says(row: int, scores: np.ndarray) -> None:
    found = table().rows[row]
    assert found.value[0] == scores.mean() and found.difference is not None
    assert found.difference[0] == pytest.approx((RESULT - scores).mean())
    assert (found.better, found.worse) == (
        int(((RESULT == 1) & (scores == 0)).sum()),
        int(((RESULT == 0) & (scores == 1)).sum()),
    )
    # Every prompt has one image here, so resampling prompts is resampling rows.
    means = np.random.default_rng(0).choice(RESULT - scores, (40_000, len(scores))).mean(axis=1)
    # Means of 8 differences of -1, 0 or 1 lie 1/8 apart.
    assert np.abs(np.subtract(found.difference[1:], np.percentile(means, [2.5, 97.5]))).max() <= 0.125


def test_the_result_stands_last_and_is_compared_with_nothing() -> None:
    found = table()
    assert found.result.value[0] == RESULT.mean() and found.result.training_evaluations == 1000
    assert (found.result.difference, found.result.better, found.result.worse) == (None, None, None)


def test_guidance_doubles_the_cost_of_an_image() -> None:
    assert [row.image_evaluations for row in table().rows] == [6, 12, 6, 6]


def test_the_best_base_is_the_best_of_its_scales() -> None:
    assert table().best_base.key == "base-2.5"
    assert table(**{"base-2.5": np.zeros(8)}).best_base.key == "base"


def test_images_that_one_of_both_has_no_score_for_are_left_out() -> None:
    base, result = BASE.copy(), RESULT.copy()
    base[0] = result[6] = np.nan
    row = table(result, base=base).rows[0]
    assert row.value[0] == pytest.approx(np.delete(BASE, [0, 6]).mean())
    assert row.difference is not None
    assert row.difference[0] == pytest.approx(np.delete(RESULT - BASE, [0, 6]).mean())
    assert (row.better, row.worse) == (1, 1)


def test_without_scores_of_the_result_there_is_no_table() -> None:
    entries = [Entry("base", "base", suite(BASE), 0.0, is_base=True)]
    entries.append(Entry("iteration-1", "EXPO 1", suite(np.full(8, np.nan)), 1.0))
    assert compare_contenders(entries, "correct", is_share=True, resamples=10, seed=0) is None


def test_a_contender_without_scores_is_left_out() -> None:
    assert [row.key for row in table(other=np.full(8, np.nan)).rows] == ["base", "base-2.5", "iteration-2"]


def test_the_base_is_called_by_its_guidance() -> None:
    assert guidance_title(suite(BASE, guidance=2.5)) == "base, guidance 2.5"


def run_with_contenders(root: Path) -> Path:
    """A synthetic run with right-or-wrong scores, the base at guidance 2.5 and a contender that was trained."""
    run_dir = make_run(root)
    judges = [{"name": "correct", "type": "scene_correct", "path": "scenes:checker_heldout"}]
    config = make_config()
    config["evaluation"] = {**config["evaluation"], "judges": judges}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    drawn = {name: suite(OTHER) for name in ("iteration-1", "iteration-2", "baseline")}
    for name, made in (drawn | {"base": suite(BASE), "iteration-3": suite(RESULT)}).items():
        save_suite(made, run_dir / "eval" / name)
    beside = run_dir / "contenders"
    save_suite(suite(GUIDED, guidance=2.5), beside / "eval" / "base-2.5")
    save_suite(suite(OTHER), beside / "eval" / "taught")
    (beside / "taught").mkdir()
    (beside / "taught" / "config.yaml").write_text(yaml.safe_dump(config | {"algorithm": {"type": "sft"}}))
    line = {"iteration": 2, "step": None, "phase": "train_summary", "cost/network_evaluations": 123}
    write_lines(beside / "taught" / "metrics.jsonl", [line])
    return run_dir


def test_a_report_has_the_table_and_json_beside_it(tmp_path: Path) -> None:
    run_dir = run_with_contenders(tmp_path)
    page = write_report(run_dir).read_text(encoding="utf-8")
    found = json.loads((run_dir / "contenders.json").read_text())
    assert [row["key"] for row in found["rows"]] == ["base", "base-2.5", "taught", "baseline", "iteration-3"]
    assert [row["title"] for row in found["rows"]][1:3] == ["base, guidance 2.5", "SFT (taught)"]
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["base-2.5"]["is_best_base"] and rows["taught"]["training_evaluations"] == 123
    assert rows["base"]["training_evaluations"] == 0 and rows["baseline"]["better"] == 2
    assert (found["judge"], found["is_share"], found["num_prompts"], found["seed"]) == ("correct", True, 8, 0)
    assert 'id="contenders"' in page and "base, guidance 2.5, its best" in page
    assert "+12.5" in page  # 75.0% against 62.5% of the base at its best guidance
    # What is evaluated beside the run stands in no figure of its iterates.
    assert "base-2.5" not in load_run(run_dir).suites


def test_the_verdict_names_the_base_at_its_best_guidance(tmp_path: Path) -> None:
    sentences = give_verdict(summarise(load_run(run_with_contenders(tmp_path)))).sentences
    told = next(sentence for sentence in sentences if "guidance scales" in sentence)
    assert told.startswith(
        "Of the base's guidance scales 2.5 is the best on these prompts (62.5%, 12 network"
    )
    assert "is +12.5 points (95% interval" in told and "; 2 images are better, 1 worse." in told


def test_a_run_without_contenders_has_no_table_on_its_page(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    for name in ("eval/baseline/suite.json", "eval/baseline"):
        path = run_dir / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "gone")
    assert 'id="contenders"' not in write_report(run_dir).read_text(encoding="utf-8")
    assert not any("guidance scales" in told for told in give_verdict(summarise(load_run(run_dir))).sentences)
