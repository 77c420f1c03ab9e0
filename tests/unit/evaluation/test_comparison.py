"""Runs beside each other: groups, joined seeds, and every number against one computed from the same scores."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from diffexpo.errors import ConfigError, MissingError
from diffexpo.evaluation.comparison import RunComparison, compare_runs
from diffexpo.evaluation.comparison_page import as_csv, sentences, write_comparison
from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import load_run, load_suite, save_suite
from diffexpo.evaluation.statistics import crossed_mean, frontier
from diffexpo.evaluation.summary import summarise
from diffexpo.files import write_json
from tests.unit.evaluation.synthetic_run import make_config, make_suite, phase_lines, train_lines, write_lines
from tests.unit.evaluation.test_report import Page

COUNT = 24
SCORERS = {"judge_heldout": "heldout-1; cosine", "judge_train": "train-1; cosine"}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a run of three iterates by arithmetic; scores depend on the seed and on `beta`."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, seed: int = 0, beta: float = 500.0, gain: float = 1.0, **changes: Any) -> Path:
        folder = root / name
        config: dict[str, Any] = make_config() | {"name": name, "seed": seed}
        config["algorithm"] = config["algorithm"] | {"beta": beta} | changes.pop("algorithm", {})
        config |= changes
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        write_json(folder / "status.json", {"state": "finished"})
        for number in range(4):
            version = "base" if number == 0 else f"iteration-{number}"
            shift = gain * number * (1.0 if number < 3 else 0.8)
            suite = make_suite(version, shift=shift, kl=number * (1 + beta / 500), count=COUNT)
            moved = np.random.default_rng([seed, number, int(beta)]).normal(
                0.2 * seed * (number > 0), 0.3, COUNT
            )
            scores = {judge: values + moved for judge, values in suite.scores.items()}
            save_suite(replace(suite, scores=scores, seed=seed, scorers=SCORERS), folder / "eval" / version)
        lines: list[dict[str, object]] = []
        for number in (1, 2, 3):
            lines += train_lines(number, 10)
            lines += phase_lines(number) if number < 3 else []
        write_lines(folder / "metrics.jsonl", lines)
        return folder

    return run


@pytest.fixture(scope="module")
def runs(make: Make) -> list[Path]:
    """Three seeds of one setting, and one seed of another."""
    return [*(make(f"a{seed}", seed) for seed in range(3)), make("b0", 0, beta=80.0, gain=0.3)]


@pytest.fixture(scope="module")
def found(runs: list[Path]) -> RunComparison:
    return compare_runs(runs)


def scores(run: Path, version: str) -> dict[str, float]:
    suite = load_suite(run / "eval" / version)
    return {prompt: value for (prompt, _), value in suite.by_image("judge_heldout").items()}


def test_runs_that_differ_in_the_seed_alone_are_one_row(found: RunComparison) -> None:
    assert [(group.label, [run.seed for run in group.runs]) for group in found.groups] == [
        ("beta 500.0", [0, 1, 2]),
        ("beta 80.0", [0]),
    ]
    assert found.settings == {"algorithm.beta": {"beta 500.0": 500.0, "beta 80.0": 80.0}}
    assert found.judge == "judge_heldout" and found.problems == () and not found.is_share


def test_joined_seeds_are_the_mean_over_seeds_and_prompts(runs: list[Path], found: RunComparison) -> None:
    rows = [
        (seed, prompt, scores(run, "iteration-3")[prompt] - before)
        for seed, run in enumerate(runs[:3])
        for prompt, before in scores(run, "base").items()
    ]
    gain, _ = crossed_mean([row[2] for row in rows], [row[0] for row in rows], [row[1] for row in rows])
    point = found.groups[0].result
    assert point is not None and point.iteration == 3 and point.seeds == 3
    assert point.gain == pytest.approx(gain) and point.gain is not None
    alone = bootstrap_mean([row[2] for row in rows], [row[1] for row in rows])
    assert point.gain[2] - point.gain[1] > alone[2] - alone[1]  # seeds differ here


def test_one_seed_has_the_numbers_of_its_own_report(runs: list[Path], found: RunComparison) -> None:
    summary, group = summarise(load_run(runs[3])), found.groups[1]
    point, run = group.result, group.runs[0]
    assert point is not None and point.gain is not None and point.score is not None and point.kl is not None
    assert point.rate == summary.wins["iteration-3"].interval
    assert point.score == summary.rewards["judge_heldout"]["iteration-3"]
    assert (
        point.kl == pytest.approx(summary.kl["iteration-3"], rel=0.2)
        and point.kl[0] == summary.kl["iteration-3"][0]
    )
    assert run.points == group.points and run.evaluations == summary.method_cost == point.evaluations
    assert [one.iteration for one in group.points] == [0, 1, 2, 3]
    spent = [one.evaluations for one in group.points]
    assert spent[0] == 0.0 and None not in spent and spent == sorted(set(spent))  # type: ignore[type-var]


def test_last_and_best_iterates_are_told_apart(make: Make) -> None:
    [group] = compare_runs([make("peak", 4)]).groups
    assert group.last is not None and group.best is not None
    assert (group.last.iteration, group.best.iteration) == (3, 3)
    means = {one.iteration: one.score[0] for one in group.points if one.score and one.iteration}
    assert group.best.iteration == max(means, key=lambda number: means[number])


def test_every_couple_is_compared_on_shared_noise(runs: list[Path], found: RunComparison) -> None:
    couples = [(one.first, one.second) for one in found.comparisons]
    assert couples == [("beta 500.0", "base"), ("beta 80.0", "base"), ("beta 500.0", "beta 80.0")]
    between = found.comparisons[2]
    assert (between.num_seeds, between.num_prompts) == (1, COUNT)  # the seed that both have
    gaps = [scores(runs[0], "iteration-3")[p] - v for p, v in scores(runs[3], "iteration-3").items()]
    assert between.difference[0] == pytest.approx(np.mean(gaps))
    assert found.comparisons[0].num_seeds == 3
    assert all(one.p_holm >= one.p_value for one in found.comparisons)
    power = found.power[2]
    assert power is not None and power.needed is not None
    assert power.detectable_with(power.needed) <= abs(between.difference[0])
    assert power.detectable == power.detectable_with(COUNT)
    assert found.ranking is not None and [one.name for one in found.ranking.models][-1] == "base"


def test_the_frontier_is_that_of_all_iterates(found: RunComparison) -> None:
    points = {("base", 0): (0.0, found.groups[0].points[0].score)} | {
        (group.label, one.iteration): (one.kl[0], one.score)
        for group in found.groups
        for one in group.points[1:]
        if one.kl
    }
    assert list(found.frontier) == frontier({key: (x, y[0]) for key, (x, y) in points.items() if y})
    assert found.frontier[0] == ("base", 0)


def test_names_of_methods_stand_for_groups_where_they_differ(make: Make) -> None:
    one = make("method-a", 5)
    other = make("method-b", 5, algorithm={"type": "diffusion_dpo"})
    assert [group.label for group in compare_runs([one, other]).groups] == ["EXPO", "Diffusion-DPO"]
    third = make("method-c", 5, beta=9.0, training={"steps": 1, "batch_size": 2})
    assert [group.label for group in compare_runs([one, third]).groups] == ["method-a", "method-c"]


def test_what_is_missing_or_wrong_is_said(make: Make, tmp_path: Path) -> None:
    whole, begun, damaged = make("whole", 6), make("begun", 7), make("damaged", 8)
    shutil.rmtree(begun / "eval")
    write_json(begun / "status.json", {"state": "running"})
    (damaged / "eval" / "iteration-3" / "suite.json").write_text("{")
    found = compare_runs([whole, begun, damaged])
    text = " ".join(found.problems)
    assert "begun has no evaluation yet (its state is running)" in text
    assert re.search(r"damaged: \S+iteration-3: not a complete evaluation", text)
    assert "damaged is not evaluated to its end (its state is finished)" in text
    assert {one.second for one in found.comparisons} == {
        "base"
    }  # a run without images has no base of its own
    [group] = found.groups
    assert [run.result for run in group.runs] == [3, None, 2]
    assert group.result is not None and group.result.iteration is None and group.result.seeds == 2
    nothing = compare_runs([begun])
    assert nothing.comparisons == () and "nothing to compare" in sentences(nothing)[0]
    assert len(write_comparison(nothing, tmp_path / "nothing")) == 4
    again = shutil.copytree(whole, tmp_path / "again")
    assert compare_runs([whole, again]).problems == (
        "again repeats whole (settings and seed); it is left out.",
    )
    with pytest.raises(MissingError, match="not a run folder"):
        compare_runs([tmp_path])
    with pytest.raises(ConfigError, match="no run to compare"):
        compare_runs([])


def test_judges_that_cannot_decide_are_refused(make: Make) -> None:
    one, other = make("judged-a", 9), make("judged-b", 10)
    with pytest.raises(
        ConfigError, match="judge_train: it is a reward of judged-a; expected one of judge_heldout"
    ):
        compare_runs([one, other], judge="judge_train")
    with pytest.raises(ConfigError, match="judge nobody: judged-a was not evaluated with it"):
        compare_runs([one, other], judge="nobody")
    base = load_suite(other / "eval" / "base")
    save_suite(
        replace(base, scorers=SCORERS | {"judge_heldout": "heldout-2; cosine"}), other / "eval" / "base"
    )
    assert "judge_heldout is not the same everywhere" in " ".join(compare_runs([one, other]).problems)
    save_suite(
        replace(base, scorers=SCORERS | {"judge_train": SCORERS["judge_heldout"]}), other / "eval" / "base"
    )
    with pytest.raises(ConfigError, match="judged-b was trained with the same scorer"):
        compare_runs([one, other])
    save_suite(replace(base, roles={"judge_train": "train"}), other / "eval" / "base")
    with pytest.raises(ConfigError, match="share no held-out judge .judged-a: judge_heldout; judged-b: none"):
        compare_runs([one, other])


def test_the_files_hold_the_same_numbers_and_are_whole(found: RunComparison, tmp_path: Path) -> None:
    html, markdown, table, numbers = write_comparison(found, tmp_path / "one")
    page = Page(html.read_text(encoding="utf-8"))
    assert page.open == [] and page.images_without_alt == 0 and len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {"fig-spent", "fig-frontier", "fig-vendi"} <= set(page.ids)
    assert "beta 500.0 is better than base" in page.text and "One seed each: beta 80.0" in page.text
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert len(rows) == 4 * 4 and {row["group"] for row in rows} == {"beta 500.0", "beta 80.0"}
    point = found.groups[1].points[3]
    row = rows[-1]
    assert row["run"] == "b0" and row["iteration"] == "3" and row["is_result"] == "True" and point.gain
    assert [float(row[f"gain{end}"]) for end in ("", "_low", "_high")] == pytest.approx(point.gain)
    held = json.loads(numbers.read_text(encoding="utf-8"))
    assert held["groups"][1]["last"]["gain"] == pytest.approx(point.gain)
    assert held["comparisons"][0]["verdict"] == "better"
    tables = re.split(r"\n\n", markdown.read_text(encoding="utf-8"))
    for part in (part.splitlines() for part in tables if part.startswith("|")):
        assert len({line.count("|") for line in part}) == 1, part
    again = write_comparison(found, tmp_path / "two")
    assert [path.read_bytes() for path in again] == [
        path.read_bytes() for path in (html, markdown, table, numbers)
    ]


def test_absent_measures_leave_cells_empty_and_a_sentence(make: Make, tmp_path: Path) -> None:
    bare = make("bare", 11)
    for version in ("base", "iteration-1", "iteration-2", "iteration-3"):
        suite = load_suite(bare / "eval" / version)
        save_suite(replace(suite, kl=[], vendi={}, vendi_images=0), bare / "eval" / version)
    found = compare_runs([bare])
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert rows[1]["kl"] == rows[1]["vendi_low"] == "" and not math.isnan(float(rows[1]["gain"]))
    html = write_comparison(found, tmp_path)[0].read_text(encoding="utf-8")
    assert "No Vendi score" in html and "evaluation.kl_prompts is 0" in html and "None but the seed" in html
