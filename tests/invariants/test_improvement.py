"""Iterative DPO with an improvement model, whole: stages, lineage, killed and resumed anywhere, a given model, the sweep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from diffexpo import assembly
from diffexpo.assembly import runs
from diffexpo.cli.progress import Console
from diffexpo.config import RunConfig, load_config
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, MissingError
from diffexpo.online.cost import check_cost, run_cost, sampling_cost, training_cost
from diffexpo.online.loop import Loop, Stage, schedule
from diffexpo.online.stages import STAGES
from diffexpo.policies.unet import UNetPolicy
from diffexpo.training.metrics import read_metrics
from diffexpo.types import Conditioning
from tests.invariants.conftest import SIGKILL, in_two_processes, kill_when, pair_rows, run_arguments, weights
from tests.tiny import tiny_flow
from tests.world import base_weights, distance

SETTINGS = [
    "algorithm={type: improvement_dpo, beta: 200.0}",
    "algorithm.improver={steps: 6, batch_size: 4, micro_batch_size: 2, checkpoint_every: 2, learning_rate: 1e-3}",
    "algorithm.improver.sampler_steps=2",
    "explore.agents=1",
    "explore.images_per_prompt=1",
    "explore.sampler.guidance=1",
    "explore.negatives.source=null",
    "hybrid={offline_weight: 0, decay: 0}",
    "training.steps=4",
    "evaluation.every_iteration=false",
    "evaluation.kl_prompts=0",
]


def run(
    world: Path, folder: Path, *more: str, resume: bool = False, stop_after: str | None = None
) -> RunConfig:
    loaded = load_config([str(world / "recipe.yaml")], [*SETTINGS, *more])
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=resume,
        console=Console(),
        stop_after=stop_after,
    )
    return loaded.config


@pytest.fixture(scope="module")
def truth(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("improvement") / "run"
    run(world, folder)
    return folder


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    timeless = lambda key: key == "wall_s" or key.startswith(("time/", "mem/"))
    return [
        {key: value for key, value in row.items() if not timeless(key)}
        for row in read_metrics(run_dir / name)
    ]


def test_stages_are_complete_in_order_and_the_policy_has_moved(truth: Path) -> None:
    store = Store(truth / "store", create=False)
    stages = [stage for stage in store.completed() if stage[0] != "offline"]
    expected = [("improver", 0)]
    expected += [(name, t) for t in (1, 2) for name in ("collect", "improve", "pair", "train")] + [
        ("train", 3)
    ]
    assert sorted(stages) == sorted(expected)
    assert len(set(weights(truth).values())) == 3  # p_1 is the base, the others moved
    trained = [row["iteration"] for row in lines(truth) if row["phase"] == "train"]
    assert trained == [2] * 4 + [3] * 4
    steps = [row for row in lines(truth, "improver/metrics.jsonl") if row["phase"] == "train"]
    assert len(steps) == 6 and all(row["train/loss"] is not None for row in steps)
    assert any("train/error_improve" in row for row in steps)
    assert json.loads((truth / "status.json").read_text())["state"] == "finished"


def test_every_pair_is_an_image_of_the_model_and_what_was_made_of_it(truth: Path) -> None:
    store = Store(truth / "store", create=False)
    improver = store.manifest("improver", 0)["weights"]
    for iteration in (1, 2):
        pairs, samples = store.pairs(iteration), {row.sample_id: row for row in store.samples(iteration)}
        assert len(pairs) == 8 == len(samples) / 2
        for pair in pairs:
            winner, loser = samples[pair.winner_id], samples[pair.loser_id]
            assert winner.improved_from == loser.sample_id and loser.improved_from is None
            assert (winner.agent, loser.agent, pair.source) == (
                "improver",
                "exploration",
                "improved",
            )
            assert (winner.prompt, winner.group) == (loser.prompt, loser.group)
            assert winner.weights == improver != loser.weights
            assert set(winner.rewards) == set(loser.rewards) == {"brightness", "kilobytes"}
            history = store.lineage(pair.pair_id)
            assert history.winner.improved_from == history.loser.sample_id
    assert store.verify() > 0


def test_metrics_of_improving_are_recorded(truth: Path) -> None:
    rows = [row for row in lines(truth) if row["phase"] == "improve"]
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["improve/images"] == 8 and row["improve/latent_distance"] > 0
        assert 0 < row["improve/relative_distance"] < 10 and -1 <= row["improve/feature_cosine"] <= 1
        assert 0 <= row["improve/reward/brightness/better"] <= 1
    (summary,) = [row for row in lines(truth) if row["phase"] == "improver"]
    assert summary["improver/error_improve"] > 0


def test_the_cost_is_what_the_stages_say(truth: Path, world: Path) -> None:
    config = load_config([str(world / "recipe.yaml")], SETTINGS).config
    store, spent = Store(truth / "store", create=False), 0.0
    for stage, iteration in store.completed():
        spent += store.manifest(stage, iteration).get("cost/network_evaluations", 0)
    cost = run_cost(config)
    assert spent == cost.total
    assert cost.sampling == 2 * 8 * 3 + 2 * 8 * 2 * 3 and cost.training == 6 * 4 * 3 + 2 * 4 * 4 * 8


SCALES = {
    "three predictions a step": [],
    "one prediction a step, offline pairs join": [
        "algorithm.improver.text_scale=1",
        "algorithm.improver.image_scale=1",
        "hybrid.offline_weight=0.5",
    ],
}


@pytest.mark.parametrize("settings", SCALES.values(), ids=SCALES.keys())
def test_every_call_of_both_denoisers_is_declared(
    settings: list[str], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation is what no method declares."""
    found: dict[tuple[str, int], int] = {}
    evaluations, predict = 0, UNetPolicy.predict

    def counting(policy: UNetPolicy, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        nonlocal evaluations
        evaluations += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        return predict(policy, x_t, t, conditioning)

    def counted(name: str, stage: Stage) -> Stage:
        def do(loop: Loop, iteration: int) -> None:
            before = evaluations
            stage(loop, iteration)
            found[name, iteration] = evaluations - before

        return do

    monkeypatch.setattr(UNetPolicy, "predict", counting)
    monkeypatch.setattr(runs, "STAGES", {name: counted(name, stage) for name, stage in STAGES.items()})
    trained = {"train": counted("train", runs.EVALUATING["train"])}
    monkeypatch.setattr(runs, "EVALUATING", runs.EVALUATING | trained)
    config = run(world, tmp_path / "run", *settings, stop_after="train-3")
    card, explore = config.algorithm, config.explore
    images = explore.prompts_per_iteration * card.images_of_prompt(config)
    declared = {
        "improver": card.stage_costs(config, 0)["training"],
        "collect": sampling_cost(config, images),
        "improve": card.stage_costs(config, images)["drawing"],
        "pair": 0,
    }
    assert found == {
        (stage, t): training_cost(config, t) + check_cost(config, t) if stage == "train" else declared[stage]
        for stage, t in schedule(config)
        if stage != "evaluate"
    }
    assert min(declared[stage] for stage in ("improver", "collect", "improve")) > 0
    assert sum(found.values()) == run_cost(config).total


MOMENTS = {
    "while the improver is trained": "checkpoints/improver/checkpoint-*",
    "while images are improved": "store/samples-0001-improve-*",
}


def test_kill_9_and_resume_is_bit_identical(world: Path, truth: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [*run_arguments(world, run_dir), *(f"--set={setting}" for setting in SETTINGS)]
    for moment, pattern in MOMENTS.items():
        code = kill_when(arguments, lambda pattern=pattern: any(run_dir.glob(pattern)), SIGKILL)
        assert code == -9, f"ended before it could be killed {moment}"
        arguments = ["run", "--resume", str(run_dir)]
    run(world, run_dir, resume=True)
    assert weights(run_dir) == weights(truth)
    assert pair_rows(run_dir) == pair_rows(truth)
    assert lines(run_dir) == lines(truth)
    assert lines(run_dir, "improver/metrics.jsonl") == lines(truth, "improver/metrics.jsonl")
    one, other = (
        (folder / "improver" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for folder in (run_dir, truth)
    )
    assert one == other


def test_two_processes_equal_one(world: Path, truth: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [f"--set={setting}" for setting in SETTINGS]
    in_two_processes(*run_arguments(world, run_dir), *settings, "--stop-after", "train-3")
    names = ("pair_id", "winner_id", "loser_id", "prompt", "source")
    ours, theirs = ([[row[name] for name in names] for row in pair_rows(path)] for path in (run_dir, truth))
    assert ours == theirs
    base = base_weights(world / "model")
    # The improvement model starts as the base with a first convolution whose weights on the losing image are
    # 0.
    first = base["conv_in.weight"]
    wider = base | {"conv_in.weight": np.concatenate([first, np.zeros_like(first)], axis=1)}
    for file, start in (("improver", wider), ("weights-0003", base)):
        one, two = (load_file(path / "checkpoints" / f"{file}.safetensors") for path in (truth, run_dir))
        assert distance(one, two, start) < 1e-3, file


def test_a_winner_is_drawn_again_bit_for_bit_from_its_row(truth: Path, tmp_path: Path) -> None:
    store = Store(truth / "store", create=False)
    winners = [row.winner_id for row in store.pairs(2)]
    for name in (winners[0], winners[-1]):
        done = assembly.regenerate(truth, name, tmp_path / "out.png")
        assert done["latents"] == "identical", done


def test_a_trained_model_is_given_to_another_run_and_improves_alike(
    world: Path, truth: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    given = f"algorithm.improver.path={truth / 'improver'}"
    run(world, folder, given, "explore.iterations=2", stop_after="train-2")
    first, second = (Store(path / "store", create=False) for path in (truth, folder))
    assert first.manifest("improver", 0)["weights"] == second.manifest("improver", 0)["weights"]
    names = [row.winner_id for row in first.pairs(1)]
    assert names == [row.winner_id for row in second.pairs(1)]
    assert np.array_equal(first.latents(names), second.latents(names))
    assert run_cost(load_config([folder / "config.yaml"]).config).training == 4 * 4 * 8


def test_the_filter_keeps_agreeing_pairs_and_offline_pairs_may_join(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ("algorithm.filter_by_reward=true", "hybrid.offline_weight=0.5", "explore.iterations=2")
    run(world, folder, *settings, stop_after="train-2")
    store = Store(folder / "store", create=False)
    samples = {row.sample_id: row for row in store.samples(1)}
    payload = store.manifest("pair", 1)
    assert payload["pairs/count"] + payload["pairs/dropped_filter"] + payload["pairs/dropped_nan"] == 8
    for pair in store.pairs(1):
        assert pair.margin > 0 and samples[pair.winner_id].improved_from == pair.loser_id
    assert [row["iteration"] for row in lines(folder) if row["phase"] == "train"] == [1] * 4 + [2] * 4


def test_the_sweep_shows_every_pair_of_scales(truth: Path) -> None:
    done = assembly.sweep(truth, text_scales=[1.0, 3.5], image_scales=[3.0], num_prompts=3)
    body = json.loads((truth / "eval" / "improver_sweep.json").read_text())
    assert [(cell["text_scale"], cell["image_scale"]) for cell in body["cells"]] == [(1.0, 3.0), (3.5, 3.0)]
    assert len(body["prompts"]) == 3 and set(body["cells"][0]["gain"]) == {
        "brightness",
        "kilobytes",
        "redness",
    }
    assert Path(str(done["picture"])).stat().st_size > 0 and len(done["scales"]) == 2


def test_a_sweep_without_a_trained_improver_says_what_to_do(world: Path, tmp_path: Path) -> None:
    loaded = load_config([str(world / "recipe.yaml")], SETTINGS)
    assembly.run(
        loaded.config, tmp_path / "run", sources={}, resume=False, console=Console(), stop_after="improver-0"
    )
    assembly.sweep(tmp_path / "run", text_scales=[1.0], image_scales=[1.0], num_prompts=2)  # losers of D_off
    (tmp_path / "run" / "store" / "manifests" / "improver-0000.json").unlink()
    with pytest.raises(MissingError, match="improve train"):
        assembly.sweep(tmp_path / "run", text_scales=[1.0], image_scales=[1.0], num_prompts=2)


def test_another_method_has_no_improver(world: Path, tmp_path: Path) -> None:
    loaded = load_config([str(world / "recipe.yaml")], ["explore.iterations=1", "algorithm.alpha=0"])
    assembly.run(
        loaded.config, tmp_path / "run", sources={}, resume=False, console=Console(), stop_after="train-1"
    )
    with pytest.raises(ConfigError, match="improvement_dpo"):
        assembly.sweep(tmp_path / "run", text_scales=[1.0], image_scales=[1.0], num_prompts=2)


def test_flow_models_are_improved_alike(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = run(
        world,
        folder,
        f"model.path={tiny_flow(tmp_path / 'flow')}",
        "explore.sampler.name=flow_euler",
        "evaluation.sampler.name=flow_euler",
        "explore.iterations=2",
        stop_after="train-2",
    )
    assert schedule(config)[0] == ("improver", 0)
    assert len(Store(folder / "store", create=False).pairs(1)) == 8
    losses = [row["train/loss"] for row in lines(folder) if row["phase"] == "train"]
    assert len(losses) == 4 and all(loss is not None for loss in losses)
