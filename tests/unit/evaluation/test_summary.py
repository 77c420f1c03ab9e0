"""Contradicting scorers and distances of improved images stand in the summary and on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffexpo.config import config_to_yaml, load_config
from diffexpo.evaluation.records import load_run
from diffexpo.evaluation.report import write_report
from diffexpo.evaluation.summary import IMPROVED as MEASURED
from diffexpo.evaluation.summary import conflict_rows, improvement_rows, summarise
from diffexpo.training.metrics import read_metrics
from tests.unit.evaluation.synthetic_run import make_run, write_lines

CONFLICTS = {
    "rollout/conflict/judge_train:denoising/rank_correlation": 0.031,
    "rollout/conflict/judge_train:denoising/disagreement": 0.485,
    "rollout/conflict/implicit:denoising/disagreement": 0.25,
}
IMPROVED = {
    "improve/images": 192,
    "improve/relative_distance": 0.97,
    "improve/feature_cosine": 0.2,
    "improve/feature_cosine_unrelated": 0.19,
    "improve/reward/judge_train/gain": -0.4,
    "improve/reward/judge_train/better": 0.4,
}


def line(phase: str, iteration: int, values: dict[str, float | None]) -> dict[str, object]:
    return {"iteration": iteration, "step": None, "phase": phase, "wall_s": 1.0} | values


def test_rows_are_those_of_the_metrics() -> None:
    rows = conflict_rows([line("collect", 1, CONFLICTS), line("collect", 2, {}), line("pair", 2, {})])
    keys = ("iteration", "first", "second", "rank_correlation", "disagreement")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (1, "implicit", "denoising", None, 0.25),
        (1, "judge_train", "denoising", 0.031, 0.485),
    ]
    assert improvement_rows([line("collect", 1, CONFLICTS)]) == []
    partly = IMPROVED | {"improve/reward/judge_train/gain": None, "improve/feature_cosine": None}
    rows = improvement_rows([line("improve", 1, IMPROVED), line("improve", 2, partly)])
    assert [tuple(row[key] for key in ("iteration", *MEASURED, "gains")) for row in rows] == [
        (1, 192, 0.97, 0.2, 0.19, {"judge_train": -0.4}),
        (2, 192, 0.97, None, 0.19, {}),
    ]


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    run_dir = make_run(tmp_path)
    lines = read_metrics(run_dir / "metrics.jsonl")
    for row in lines:
        if row["phase"] == "collect":
            row.update(CONFLICTS)
    lines.append(line("improve", 1, IMPROVED))
    write_lines(run_dir / "metrics.jsonl", lines)
    return run_dir


def test_the_page_shows_conflicts_improvements_and_their_alarm(shown: Path) -> None:
    summary = summarise(load_run(shown))
    assert [row["iteration"] for row in summary.conflicts] == [1, 1, 2, 2]
    assert [alarm.name for alarm in summary.alarms] == ["improver_unrelated"]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", write_report(shown).read_text(encoding="utf-8")))
    assert "2 judge_train and denoising 0.0310 48.5%" in text
    assert "1 implicit and denoising - 25.0%" in text
    assert "1 192 0.970 0.200 0.190 judge_train -0.40" in text
    assert "improver unrelated" in text and "0.970 times as far" in text


def test_a_run_without_them_has_no_such_part(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "Do the scorers agree?" not in page and "The improvement model" not in page
    assert not summarise(load_run(run_dir)).conflicts


def test_guidance_that_does_not_go_together_is_noted(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    assert "guidance" not in {alarm.name for alarm in summarise(load_run(run_dir)).alarms}
    config = load_config([run_dir / "config.yaml"], ["evaluation.sampler.guidance=1.5"], {}).config
    (run_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    (alarm,) = [alarm for alarm in summarise(load_run(run_dir)).alarms if alarm.name == "guidance"]
    assert alarm.severity == "note" and "evaluation.sampler.guidance = 1.5" in alarm.message
    text = re.sub(r"\s+", " ", write_report(run_dir).read_text(encoding="utf-8"))
    assert "Guidance is set inconsistently: explore.sampler.guidance" in text and "docs/guidance.md" in text
