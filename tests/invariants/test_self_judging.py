"""EXPO without a reward, whole: a run trained on pairs judges another, the base judges, killed and resumed, exports judge alike."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo import assembly
from diffexpo.assembly.evaluating import check_same_judges
from diffexpo.assembly.objects import build_policy
from diffexpo.assembly.self_judges import open_denoiser
from diffexpo.cli.progress import Console
from diffexpo.config import RunConfig, load_config
from diffexpo.config.rewards import RewardCard, SelfJudgeConfig, read_card
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, MissingError, ResumeError
from diffexpo.evaluation.records import load_suite
from diffexpo.rewards.base import load_rewards
from diffexpo.training.metrics import read_metrics
from tests.invariants.conftest import SIGKILL, diffexpo, kill_when, pair_rows, run_arguments, weights

OFFLINE = ["explore.iterations=1", "algorithm={type: diffusion_dpo, beta: 200.0}", "training.steps=3"]
QUICK = ["evaluation.kl_prompts=0", "evaluation.every_iteration=false", "training.steps=2"]
WATCHED = '{{name: brightness, type: python, path: "{}/rewards.py:brightness", role: watch}}'
SELF = "self_judge: {draws: 3, timestep_range: [0.2, 1.0]}"


def run(world: Path, folder: Path, *settings: str, stop_after: str | None = None) -> RunConfig:
    loaded = load_config([str(world / "recipe.yaml")], settings)
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=False,
        console=Console(),
        stop_after=stop_after,
    )
    return loaded.config


def expo(world: Path, judge: str) -> list[str]:
    """Settings of EXPO with one self-judge that ranks, another one that evaluates, and a reward that watches."""
    other = "{name: told_late, type: denoising, self_judge: {draws: 2}}" if "implicit" in judge else ""
    judges = [f"evaluation.judges=[{other}]"] if other else []
    return [*QUICK, f"rewards=[{{name: own, {judge}, {SELF}}}, {WATCHED.format(world)}]", *judges]


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Diffusion-DPO on the offline pairs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(world, folder, *OFFLINE)
    return folder


@pytest.fixture(scope="module")
def judged(world: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EXPO in which that run judges."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    run(world, folder, *expo(world, f"type: implicit, path: {trained}"))
    return folder


def open_judge(folder: Path, reward: RewardCard):
    config = load_config([str(folder / "config.yaml")], []).config
    policy = build_policy(config)
    return load_rewards([reward], str, "cpu", partial(open_denoiser, config, policy))[0]


def check_pairs(folder: Path, iterations: tuple[int, ...]) -> None:
    """Every pair's winner has the highest score of its prompt, its loser the lowest."""
    store = Store(folder / "store", create=False)
    for iteration in iterations:
        scores: dict[int, list[float]] = {}
        by_id = {}
        for row in store.samples(iteration):
            assert np.isfinite(row.rewards["own"]) and np.isfinite(row.rewards["brightness"])
            scores.setdefault(row.group, []).append(row.rewards["own"])
            by_id[row.sample_id] = row
        assert len({value for values in scores.values() for value in values}) > 4
        pairs = store.pairs(iteration)
        assert len(pairs) == 4
        for pair in pairs:
            winner, loser = by_id[pair.winner_id], by_id[pair.loser_id]
            values = scores[winner.group]
            assert (winner.rewards["own"], loser.rewards["own"]) == (max(values), min(values))


def test_a_trained_run_judges_and_the_policy_moves(judged: Path) -> None:
    check_pairs(judged, (1, 2))
    assert len(set(weights(judged).values())) == 3
    lines = [line for line in read_metrics(judged / "metrics.jsonl") if line["phase"] == "collect"]
    for line in lines:
        assert line["rollout/conflict/own:brightness/disagreement"] is not None
        rows = Store(judged / "store", create=False).samples(int(line["iteration"]))
        main = [row.rewards["own"] for row in rows if row.agent == "main"]
        assert line["rollout/agent/main/reward"] == pytest.approx(np.mean(main))  # the reward that ranks
    suite = load_suite(judged / "eval" / "iteration-3")
    assert suite.roles == {"told_late": "heldout", "own": "train", "brightness": "watch"}
    assert np.isfinite(suite.scores["own"]).all() and np.isfinite(suite.scores["told_late"]).all()
    assert "3 draws" in suite.scorers["own"]
    assert "Do the scorers agree?" in (judged / "report.html").read_text(encoding="utf-8")


def test_stored_scores_come_again_bit_for_bit_from_stored_latents(judged: Path) -> None:
    """However the run cut its batches and in whatever thread it scored: each image alone, in a process of another life."""
    config = load_config([str(judged / "config.yaml")], []).config
    judge = open_judge(judged, config.rewards[0])
    store = Store(judged / "store", create=False)
    for row in store.samples(2):
        latents = torch.from_numpy(store.latents([row.sample_id]))
        assert float(judge.score(latents, [row.prompt])[0]) == row.rewards["own"]
    known = load_suite(judged / "eval" / "base").scorers
    check_same_judges(lambda: known, [judge], "base")
    other = config.rewards[0].model_copy(update={"self_judge": SelfJudgeConfig(draws=2)})
    with pytest.raises(ResumeError, match="reward 'own' is no longer the judge"):
        check_same_judges(lambda: known, [open_judge(judged, other)], "base")


def test_an_export_judges_as_its_run_and_other_folders_are_refused(
    world: Path, trained: Path, judged: Path, tmp_path: Path
) -> None:
    store = Store(judged / "store", create=False)
    rows = store.samples(1)[:4]
    latents = torch.from_numpy(store.latents([row.sample_id for row in rows]))
    texts = [row.prompt for row in rows]
    lora = tmp_path / "lora"
    run(world, lora, *OFFLINE, "tuning={kind: lora, lora: {rank: 2, alpha: 4}}")
    for folder in (trained, lora):
        one, two = (
            open_judge(judged, read_card(name="own", type="implicit", path=str(path)))
            for path in (folder, folder / "export")
        )
        scores = one.score(latents, texts)
        assert scores.abs().min() > 0
        assert torch.equal(scores, two.score(latents, texts)), folder
    shutil.copytree(world / "model", tmp_path / "again")
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(trained / "config.yaml", unfinished)
    for path, error, words in (
        (tmp_path / "again", ConfigError, "would score 0"),
        (tmp_path / "empty", ConfigError, "holds no run"),
        (tmp_path / "none", MissingError, "diffexpo run emoji/dpo_offline"),
        (unfinished, MissingError, "not trained to its end"),
    ):
        with pytest.raises(error, match=words):
            open_judge(judged, read_card(name="own", type="implicit", path=str(path)))
    with pytest.raises(ConfigError, match="trained whole, in float32"):
        open_judge(judged, read_card(name="own", type="implicit", path=str(trained), precision="bfloat16"))


def test_the_base_judges_killed_while_collecting_and_resumed(world: Path, tmp_path: Path) -> None:
    truth, killed = tmp_path / "truth", tmp_path / "killed"
    settings = [*expo(world, "type: denoising"), "explore.iterations=2"]
    run(world, truth, *settings, stop_after="train-2")
    check_pairs(truth, (1,))
    arguments = [*run_arguments(world, killed), *(f"--set={setting}" for setting in settings)]
    code = kill_when(arguments, lambda: any(killed.glob("store/**/samples-0001-*")), SIGKILL)
    assert code == -9, "the run ended before it could be killed"
    diffexpo("run", "--resume", killed)
    assert weights(killed) == weights(truth) and pair_rows(killed) == pair_rows(truth)
    assert json.loads((killed / "status.json").read_text())["state"] == "finished"


def test_spo_and_the_filter_of_improved_pairs_take_self_judges(world: Path, tmp_path: Path) -> None:
    told = f"rewards=[{{name: own, type: denoising, {SELF}}}]"
    spo = tmp_path / "spo"
    run(
        world, spo, *QUICK, told, "offline.source=null", "explore.iterations=1", "explore.agents=1",
        "algorithm={type: spo, num_candidates: 2, first_transition: 1, threshold: 0.0}", stop_after="train-1",
    )  # fmt: skip
    store = Store(spo / "store", create=False)
    assert all(np.isfinite(row.rewards["own"]) for row in store.samples(1))
    improved = tmp_path / "improved"
    run(
        world, improved, *QUICK, told, "explore.iterations=2", "explore.agents=1", "explore.negatives.source=null",
        "algorithm={type: improvement_dpo, beta: 200.0, filter_by_reward: true}", "hybrid={offline_weight: 1, decay: 0}",
        "algorithm.improver={steps: 2, batch_size: 4, micro_batch_size: 4, learning_rate: 1e-3}",
        stop_after="train-2",
    )  # fmt: skip
    rows = {row.sample_id: row for row in Store(improved / "store", create=False).samples(1)}
    pairs = Store(improved / "store", create=False).pairs(1)
    assert len(rows) == 32
    for pair in pairs:
        gap = rows[pair.winner_id].rewards["own"] - rows[pair.loser_id].rewards["own"]
        assert gap > 0 and pair.margin == pytest.approx(gap)
