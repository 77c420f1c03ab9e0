"""A report speaks of the method that was run: its name, and only the parts that it has."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from diffexpo.config import config_to_yaml, load_config
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.config.schema import TrainingConfig
from diffexpo.evaluation.alarms import History, check_alarms
from diffexpo.evaluation.records import load_run
from diffexpo.evaluation.report import write_report
from diffexpo.evaluation.summary import summarise
from diffexpo.evaluation.verdict import give_verdict
from diffexpo.evaluation.wording import describe_method
from diffexpo.training.metrics import read_metrics
from tests.unit.evaluation.synthetic_run import make_run, write_lines
from tests.unit.evaluation.test_alarms import BASE
from tests.unit.evaluation.test_report import Page

PAIRS = re.compile(r"\bpairs?\b", re.IGNORECASE)


def turn_into(run_dir: Path, recipe: str, *changes: str) -> Path:
    """The synthetic run as one of another method: its settings, and the lines that such a run writes."""
    config = load_config([recipe], ("explore.iterations=3", "evaluation.bootstrap=200", *changes), {}).config
    (run_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    shutil.rmtree(run_dir / "baseline")
    shutil.rmtree(run_dir / "eval" / "baseline")
    return run_dir


def rewrite_metrics(run_dir: Path, keep: tuple[str, ...], train: tuple[str, ...], agent: str) -> None:
    """Lines of some phases, training lines with some metrics, and the reward of one agent."""
    lines = []
    for line in read_metrics(run_dir / "metrics.jsonl"):
        if line["phase"] not in keep:
            continue
        if line["phase"] == "train":
            values = {name: line.get(name, 0.1) for name in train}
            line = {key: value for key, value in line.items() if "/" not in key} | values
        reward = line.pop("rollout/agent/exploration/reward", None)
        line.pop("rollout/agent/main/reward", None)
        lines.append(line if reward is None else line | {f"rollout/agent/{agent}/reward": reward})
    write_lines(run_dir / "metrics.jsonl", lines)


def read(run_dir: Path) -> tuple[str, Page, str]:
    source = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(source)
    return source, page, re.sub(r"\s+", " ", page.text)


@pytest.fixture(scope="module")
def ddpo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page, str]:
    run_dir = turn_into(make_run(tmp_path_factory.mktemp("ddpo")), "emoji/ddpo")
    shutil.rmtree(run_dir / "eval" / "pairs")
    rewrite_metrics(
        run_dir,
        ("train", "train_summary", "collect"),
        ("train/loss", "train/ratio", "train/clip_fraction"),
        "main",
    )
    return run_dir, *read(run_dir)


@pytest.fixture(scope="module")
def kto(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, str]:
    run_dir = turn_into(make_run(tmp_path_factory.mktemp("kto")), "emoji/diffusion_kto")
    rewrite_metrics(
        run_dir,
        ("train", "train_summary", "collect", "pair"),
        ("train/loss", "train/implicit_accuracy"),
        "exploration",
    )
    return read(run_dir)


def test_a_ddpo_run_says_ddpo(ddpo: tuple[Path, str, Page, str]) -> None:
    _, source, page, text = ddpo
    assert page.open == [] and "Preference alignment with DDPO:" in text
    assert "EXPO" not in source
    for sentence in (
        "images of DDPO 3 to the base's",
        "base \u2192 DDPO",
        "DDPO itself:",
        "DDPO 1, DDPO 2, ...",
    ):
        assert sentence in text, sentence
    assert "method DDPO: Black et al. (2024)" in text


def test_a_method_on_trajectories_speaks_of_no_pairs_agents_or_offline_dpo(
    ddpo: tuple[Path, str, Page, str],
) -> None:
    _, source, page, text = ddpo
    assert PAIRS.search(text) is None
    for absent in ("exploration agent", "offline DPO", "Implicit accuracy", "ln 2", "tau", "winner", "loser"):
        assert absent not in text, absent
    assert "pairs" not in page.ids and "#pairs" not in page.links
    # Left out, not an empty box: what is drawn is what such a run has.
    drawn = {link.removeprefix("fig-") for link in page.ids if link.startswith("fig-")}
    assert drawn == {"win_rate", "heldout", "train_reward", "frontier", "vendi", "loss", "clipping", "agents"}
    assert re.findall(r'class="absent">([^<:]*)', source) == ["Nothing is exported yet"]
    assert "Reward of collected images" in text


def test_its_verdict_has_no_tile_for_a_comparison_that_does_not_exist(
    ddpo: tuple[Path, str, Page, str],
) -> None:
    verdict = give_verdict(summarise(load_run(ddpo[0])))
    assert [tile.title for tile in verdict.tiles] == [
        "Win rate vs base",
        "Diversity (Vendi)",
        "KL to the base",
    ]
    assert "DPO" not in " ".join(verdict.sentences).replace("DDPO", "")


def test_images_with_scores_are_best_and_worst_not_winners_of_pairs(kto: tuple[str, Page, str]) -> None:
    _, page, text = kto
    assert page.open == [] and "Preference alignment with Diffusion-KTO:" in text
    assert PAIRS.search(text) is None and "exploration agent" not in text and "EXPO" not in text
    assert "Best and worst of what was collected" in text and "#pairs" in page.links
    drawn = {link for link in page.ids if link.startswith("fig-")}
    assert "fig-accuracy" in drawn and not drawn & {"fig-errors", "fig-kept", "fig-who_won", "fig-tau"}


@pytest.mark.parametrize("recipe", ["emoji/orpo", "emoji/dpo_online"])
def test_accuracy_is_explained_by_a_reference_only_where_there_is_one(recipe: str, tmp_path: Path) -> None:
    run_dir = turn_into(make_run(tmp_path), recipe)
    rewrite_metrics(run_dir, ("train", "train_summary"), ("train/loss", "train/implicit_accuracy"), "main")
    text = read(run_dir)[2]
    assert ("Share of pairs whose winner gained more on the reference" in text) is (recipe != "emoji/orpo")
    assert ("There is no reference" in text) is (recipe == "emoji/orpo")


def test_expo_with_one_agent_and_no_negative_prompts_has_no_one_to_compare(tmp_path: Path) -> None:
    run_dir = turn_into(make_run(tmp_path), "emoji/expo_one_agent", "explore.negatives.source=null")
    rewrite_metrics(
        run_dir,
        ("train", "train_summary", "collect", "pair"),
        ("train/loss", "train/implicit_accuracy"),
        "exploration",
    )
    _, page, text = read(run_dir)
    drawn = {link for link in page.ids if link.startswith("fig-")}
    assert "fig-kept" in drawn and not drawn & {"fig-who_won", "fig-tau"}
    assert "exploration agent" not in text and "Winners exploring" not in text
    assert "the model draws images, rewards rank them" in text


def test_a_run_that_has_not_trained_yet_still_says_what_will_come(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("algorithm: {type: expo}\n", encoding="utf-8")
    text = read(tmp_path)[2]
    assert "No training step with train/implicit_accuracy" in text and "train/clip_fraction" not in text


def test_the_report_lists_what_to_cite_unless_the_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("algorithm: {type: expo}\n", encoding="utf-8")
    assert "What to cite" in read(tmp_path)[2]
    (tmp_path / "config.yaml").write_text("of_another_version: 1\n", encoding="utf-8")
    assert "What to cite" not in read(tmp_path)[2]


@pytest.mark.parametrize("kind", METHOD_BY_NAME)
def test_every_method_is_described_without_another_ones_words(kind: str) -> None:
    method = describe_method(
        {"algorithm": {"type": kind}, "explore": {"agents": 1, "negatives": {"source": None}}}
    )
    texts = f"{method.story} {method.first_iterate}"
    assert method.name != "EXPO" or kind == "expo"
    assert "agent" not in texts and method.label("iteration-2") == f"{method.name} 2"
    assert method.card.has_pairs or PAIRS.search(texts) is None
    assert method.story.endswith(".") and method.first_iterate.endswith(".")
    group, _, setting = method.card.restraint.split()[-1].partition(".")
    groups = {"algorithm": METHOD_BY_NAME[kind], "training": TrainingConfig}
    assert setting in groups[group].model_fields


@pytest.mark.parametrize(
    ("algorithm", "start"),
    [
        ({"type": "expo"}, math.log(2)),
        ({"type": "diffusion_dpo", "kind": "robust"}, math.log(2)),
        ({"type": "diffusion_dpo", "kind": "ipo"}, None),
        ({"type": "expo", "kind": "linear"}, 0.3125),
        ({"type": "improvement_dpo", "kind": "linear"}, 0.3125),
        ({"type": "diffusion_dpo", "kind": "linear", "sft_weight": 0.1}, None),
        ({"type": "diffusion_dpo", "sft_weight": 0.1}, None),
        ({"type": "d3po"}, math.log(2)),
        ({"type": "mapo"}, None),
        ({"type": "orpo"}, None),
        ({"type": "ddpo"}, None),
    ],
)
def test_where_the_loss_starts_is_stated_only_where_it_is_a_number(
    algorithm: dict, start: float | None
) -> None:
    assert describe_method({"algorithm": algorithm}).card.start_loss == start


def test_nothing_is_compared_with_offline_dpo_unless_there_are_offline_pairs_or_it_is_asked_for() -> None:
    without = {"algorithm": {"type": "expo"}, "offline": {"source": None}}
    assert describe_method({}).compares_offline and not describe_method(without).compares_offline
    assert describe_method(without | {"baseline": {"offline_dpo": True}}).compares_offline
    assert not describe_method({"explore": {"iterations": 1}}).compares_offline


def test_derived_training_cost_is_that_of_pairs_or_unknown(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    config |= {"algorithm": {"type": "rwr"}, "offline": {"source": None}}
    (run_dir / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    summary = summarise(load_run(run_dir))
    rows = {row.phase: row for row in summary.costs}
    assert rows["train"].evaluations is None and rows["collect"].evaluations is not None
    assert summary.method_cost is None


def test_alarms_advise_with_the_methods_own_setting() -> None:
    last = replace(BASE, iteration=1, win_rate=(0.3, 0.2, 0.4), vendi=2.0)
    ddpo = describe_method({"algorithm": {"type": "ddpo"}, "offline": {"source": None}})
    history = History((BASE, last), restraint=ddpo.card.restraint, has_offline=ddpo.has_offline)
    advice = " ".join(alarm.what_to_do for alarm in check_alarms(history))
    assert "ower algorithm.clip_range" in advice and "beta" not in advice and "offline" not in advice
    assert "Raise algorithm.beta, keep offline data" in check_alarms(History((BASE, last)))[-1].what_to_do
