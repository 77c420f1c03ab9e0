"""What a run is compared with: the base at other guidance, offline DPO at equal cost, a recipe trained beside it, a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffexpo import assembly
from diffexpo.assembly.contenders import open_baseline, run_baseline
from diffexpo.assembly.evaluating import draw_suite, vendi_embedder
from diffexpo.assembly.objects import build_loop
from diffexpo.cli.progress import Console
from diffexpo.config import RunConfig, config_to_yaml, load_config
from diffexpo.config.contenders import read_contenders
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, MissingError, RewardError
from diffexpo.evaluation.records import load_run, load_suite
from diffexpo.evaluation.summary import summarise
from diffexpo.online.cost import evaluations_of_row, offline_steps_of_equal_cost, run_cost
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.rewards.base import load_rewards
from diffexpo.training.checkpoint import read_tensors
from diffexpo.training.distributed import World
from diffexpo.training.signals import StopSignal
from tests.commands import in_two_processes

QUICK = [
    "explore.iterations=2",
    "training.steps=2",
    "training.checkpoint_every=10",
    "evaluation.kl_prompts=2",
    "algorithm.alpha=0",
    "offline.source=null",
]


def settings(world: Path, *more: str) -> RunConfig:
    return load_config([str(world / "recipe.yaml")], [*QUICK, *more]).config


def run(config: RunConfig, folder: Path, *, resume: bool = False, stop_after: str | None = None) -> Path:
    assembly.run(config, folder, sources={}, resume=resume, console=Console(), stop_after=stop_after)
    return folder


def same_weights(one: Path, other: Path, iteration: int) -> bool:
    name = f"checkpoints/weights-{iteration:04d}.safetensors"
    first, second = (read_tensors(folder / name) for folder in (one, other))
    return all(torch.equal(first[key], second[key]) for key in {**first, **second})


@pytest.fixture(scope="module")
def taught(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that learns from offline pairs alone, by another method."""
    path = tmp_path_factory.mktemp("recipes") / "taught.yaml"
    recipe = f"name: taught\nexplore: {{iterations: 1}}\nrewards: []\noffline: {{source: {world}/offline.parquet}}\n"
    training = "training: {steps: 3, batch_size: 4, micro_batch_size: 4, learning_rate: 1.0e-3}\n"
    path.write_text(f"{recipe}{training}algorithm: {{type: sft}}\n")
    return path


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained before."""
    return run(settings(world, "seed=3"), tmp_path_factory.mktemp("before") / "earlier")


def beside(world: Path, taught: Path, finished: Path) -> list[str]:
    """Settings of a run that is compared with everything."""
    source, named = world / "offline.parquet", f"['{taught}', '{finished}']"
    return [
        f"baseline={{offline_dpo: true, offline_source: {source}, contenders: {named}}}",
        "evaluation.base_guidances=[1.0, 3.0]",
    ]


@pytest.fixture(scope="module")
def compared(world: Path, taught: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is compared with everything."""
    config = settings(world, *beside(world, taught, finished))
    return run(config, tmp_path_factory.mktemp("compared") / "run")


def test_every_contender_stands_in_the_table_with_its_cost(compared: Path, finished: Path) -> None:
    found = json.loads((compared / "contenders.json").read_text())
    rows = {row["key"]: row for row in found["rows"]}
    assert list(rows) == ["base", "base-1", "base-3", "earlier", "taught", "baseline", "iteration-2"]
    assert [rows[key]["image_evaluations"] for key in ("base", "base-1", "base-3")] == [6, 3, 6]
    # Supervised fine-tuning takes 3 evaluations of each of 4 images in 3 steps.
    assert rows["taught"]["training_evaluations"] == 3 * 4 * 3
    assert rows["earlier"]["training_evaluations"] == summarise(load_run(finished)).method_cost
    assert rows["iteration-2"]["training_evaluations"] == summarise(load_run(compared)).method_cost > 0
    spent = rows["baseline"]["training_evaluations"], rows["iteration-2"]["training_evaluations"]
    assert abs(spent[0] - spent[1]) <= 4 * 8 / 2


def test_all_are_drawn_for_the_same_prompts_from_the_same_noise(compared: Path) -> None:
    record = load_run(compared)
    base = record.suites["base"]
    for name, beside in record.contenders.items():
        assert beside.suite.prompts == base.prompts, name
        assert beside.suite.image_index.tolist() == base.image_index.tolist()
    guided = record.contenders["base-3"].suite
    assert guided.sampler == base.sampler | {"guidance": 3.0}
    assert not np.array_equal(guided.images, base.images)


def test_a_contender_is_what_its_recipe_makes_of_the_same_start(
    compared: Path, world: Path, taught: Path
) -> None:
    config = load_config([str(world / "recipe.yaml"), str(taught)], ["evaluation.kl_prompts=0"]).config
    alone = run(config, compared.parent / "alone", stop_after="evaluate-1")
    assert same_weights(alone, compared / "contenders" / "taught", 1)


def test_a_finished_run_is_evaluated_with_its_own_weights(compared: Path, finished: Path) -> None:
    assert same_weights(finished, compared / "contenders" / "earlier", 2)
    drawn = load_suite(compared / "contenders" / "eval" / "earlier")
    assert not np.array_equal(drawn.images, load_suite(compared / "eval" / "iteration-2").images)


def test_the_baseline_learns_from_pairs_of_its_own_and_the_run_does_not(compared: Path) -> None:
    own, other = (Store(folder / "store").pairs() for folder in (compared, compared / "baseline"))
    assert {pair.source for pair in own} == {"online"} and {pair.source for pair in other} == {"offline"}


def test_what_is_done_is_not_done_again(compared: Path) -> None:
    kept = [*compared.rglob("checkpoints/*.safetensors"), *compared.rglob("suite.json")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(kept) == 2 + 1 + 1 + 1 + 3 + 5  # iterates of run, baseline and both contenders; evaluations
    config = load_config([compared / "config.yaml"], (), {}).config
    run(config, compared, resume=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_processes_make_the_same_table(
    compared: Path, world: Path, taught: Path, finished: Path, tmp_path: Path
) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(config_to_yaml(settings(world, *beside(world, taught, finished))))
    in_two_processes("run", recipe, "--out", folder)
    one, two = (json.loads((run / "contenders.json").read_text())["rows"] for run in (compared, folder))
    assert [row["key"] for row in one] == [row["key"] for row in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["training_evaluations"] == theirs["training_evaluations"]
        # Gradients are summed in another order; scores are differences of mean colours in [0, 1].
        assert ours["value"] == pytest.approx(theirs["value"], abs=2e-3)


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ("runs/nowhere", MissingError, "no recipe 'runs/nowhere'"),
        ("emoji/improvement_dpo", ConfigError, "needs models of its own"),
        ("TAUGHT TAUGHT", ConfigError, "'taught' is taken"),
        ("emoji/ddpo", ConfigError, "with what it shares with the run"),
    ],
)
def test_a_contender_that_cannot_be_one_is_refused_before_anything_is_spent(
    world: Path, taught: Path, tmp_path: Path, named: str, error: type[Exception], said: str
) -> None:
    names = [str(taught) if name == "TAUGHT" else name for name in named.split()]
    config = settings(
        world,
        f"baseline.contenders={json.dumps(names)}",
        "rewards.0.role=watch",
        "rewards.1.role=watch",
        "explore.iterations=1",
        f"offline.source={world}/offline.parquet",
    )
    with pytest.raises(error, match=said):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "eval").exists()


def test_a_finished_run_that_was_not_trained_to_its_end_is_refused(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(MissingError, match="baseline.contenders: .*not trained to its end"):
        run(settings(world, f"baseline.contenders=['{cut}']"), tmp_path / "run")


def test_contenders_take_the_groups_of_the_run(world: Path, taught: Path) -> None:
    config = settings(world, f"baseline.contenders=['{taught}']", "seed=11", "explore.batch_size=3")
    contender = read_contenders(config)[0]
    assert (contender.config.seed, contender.config.model) == (11, config.model)
    assert contender.config.explore.batch_size == 3 and contender.config.explore.iterations == 1
    assert contender.config.baseline.contenders == ()


# ---- starting from a contender ---------------------------------------------------------------------------


def from_taught(world: Path, taught: Path, *more: str) -> RunConfig:
    beside = (
        f"baseline={{offline_dpo: true, offline_source: {world}/offline.parquet, contenders: ['{taught}']}}"
    )
    return settings(world, beside, "tuning.start=contender:taught", *more)


@pytest.fixture(scope="module")
def started(world: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that starts from a contender of its own."""
    return run(from_taught(world, taught), tmp_path_factory.mktemp("started") / "run")


def test_a_run_starts_where_its_contender_ends_and_so_does_the_baseline(
    started: Path, compared: Path
) -> None:
    start = read_tensors(started / "checkpoints" / "weights-0000.safetensors")
    last = read_tensors(started / "contenders" / "taught" / "checkpoints" / "weights-0001.safetensors")
    assert all(torch.equal(start[key], last[key]) for key in {**start, **last})
    # It is trained from the base itself, as beside a run that starts there; the baseline is not.
    assert same_weights(started / "contenders" / "taught", compared / "contenders" / "taught", 1)
    assert not same_weights(started / "baseline", compared / "baseline", 1)
    drawn = load_suite(started / "eval" / "iteration-1").images
    assert np.array_equal(drawn, load_suite(started / "contenders" / "eval" / "taught").images)
    assert not np.array_equal(drawn, load_suite(started / "eval" / "base").images)


def test_what_the_start_cost_is_counted_for_all_that_start_there(started: Path) -> None:
    found = json.loads((started / "contenders.json").read_text())
    rows = {row["key"]: row for row in found["rows"]}
    assert "where training starts" in rows["taught"]["title"]
    own = summarise(load_run(started)).method_cost
    assert rows["iteration-2"]["training_evaluations"] == own + rows["taught"]["training_evaluations"]


@pytest.mark.parametrize("stage", ["train-1", "collect-1"])
def test_a_run_from_a_contender_resumes_with_the_same_weights(
    world: Path, taught: Path, started: Path, tmp_path: Path, stage: str
) -> None:
    config = from_taught(world, taught)
    run(config, tmp_path / "run", stop_after=stage)
    run(config, tmp_path / "run", resume=True)
    assert same_weights(tmp_path / "run", started, 2)
    assert same_weights(tmp_path / "run" / "baseline", started / "baseline", 1)


def test_a_start_that_is_no_contender_is_refused(world: Path, taught: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no contender of that name; expected contender:taught"):
        run(from_taught(world, taught, "tuning.start=contender:tuaght"), tmp_path / "run")
    assert not (tmp_path / "run" / "eval").exists()


# ---- equal cost ------------------------------------------------------------------------------------------


class Counter:
    """Network evaluations of every forward of a denoiser, by a hook on modules: a row is one, and two more
    where a backward follows."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind, self.evaluations = kind, 0

    def __call__(
        self, module: nn.Module, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, object], output: object
    ) -> None:
        if isinstance(module, self.kind):
            rows = inputs[0] if inputs else kwargs["sample"]
            self.evaluations += len(rows) * (3 if torch.is_grad_enabled() else 1)


HELD = ["algorithm.draws=3", "algorithm.anchor_weight=0.02", "algorithm.anchor_guidance=2.5"]


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        # Policy 1 + 2, reference 1, and the anchor's two branches, of which the reference is one where it is the base.
        ([*HELD, "algorithm.reference=ema"], 2 * 3 * (3 + 1 + 2)),
        ([*HELD, "algorithm.reference=base"], 2 * 3 * (3 + 1 + 1)),
        (["algorithm.draws=2"], 2 * 2 * (3 + 1)),
    ],
)
def test_both_spend_the_evaluations_that_are_stated(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], row: int
) -> None:
    config = settings(
        world, *changes, "baseline.offline_dpo=true", f"baseline.offline_source={world}/offline.parquet"
    )
    with StopSignal() as stop:
        loop = build_loop(config, tmp_path / "run", Console(), stop, World())
    counter = Counter(type(loop.policy.weights.network))
    hook = nn.modules.module.register_module_forward_hook(counter, with_kwargs=True)
    try:
        run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
        run_spent, counter.evaluations = counter.evaluations, 0
        lane = replace(open_baseline(loop), evaluate=lambda loop, name, iteration: None)
        run_baseline(loop, lane)
        baseline_spent = counter.evaluations
    finally:
        hook.remove()
    # 4 prompts, 4 images each, 3 steps with guidance; then 2 steps of 4 pairs.
    assert run_spent == run_cost(config).total == 4 * 4 * 3 * 2 + 2 * 4 * row
    held = 2 * int(loop.config.algorithm.data.draws) * (4 + ("algorithm.anchor_weight=0.02" in changes))
    assert evaluations_of_row(lane.config.algorithm, lane.config.training, is_guided=False) == held
    assert baseline_spent == offline_steps_of_equal_cost(config) * 4 * held
    assert abs(baseline_spent - run_spent) <= 4 * held / 2


# ---- what is found before time is spent ---------------------------------------------------------------------


def test_a_judge_that_can_score_no_image_stops_the_run_after_the_base(world: Path, tmp_path: Path) -> None:
    # The prompts of the tiny world are none of the scenes' grammar, and its images are too small.
    judges = "evaluation.judges=[{name: correct, type: scene_correct, path: 'scenes:checker_heldout'}]"
    with pytest.raises(
        RewardError, match="judge 'correct' .*none of 3 images of the base got a finite score"
    ):
        run(settings(world, judges), tmp_path / "run")
    assert not (tmp_path / "run" / "eval" / "base" / "suite.json").exists()
    assert Store(tmp_path / "run" / "store").completed() == []
    assert "scene" in (tmp_path / "run" / "log.txt").read_text()


def test_an_iterate_that_nothing_changed_is_evaluated_as_if_it_was_drawn(world: Path, tmp_path: Path) -> None:
    config = settings(world, "evaluation.vendi_prompts=1", "evaluation.vendi_images=3")
    folder = run(config, tmp_path / "run", stop_after="evaluate-1")
    taken = load_suite(folder / "eval" / "iteration-1")
    with StopSignal() as stop:
        loop = build_loop(config, folder, Console(), stop, World())
    judges = load_rewards(config.evaluation.judges, str, loop.policy.device)
    rewards = load_rewards(config.rewards, str, loop.policy.device)
    drawn = draw_suite(
        loop, config.evaluation, "iteration-1", 1, lambda: None, judges, rewards, vendi_embedder(judges)
    )
    for name, value in vars(drawn).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(value, vars(taken)[name]), name
        elif name == "scores":
            assert all(np.array_equal(value[scorer], taken.scores[scorer]) for scorer in value)
        elif name not in ("seconds", "network_evaluations"):
            assert value == vars(taken)[name], name
    assert taken.network_evaluations == 0 < drawn.network_evaluations and taken.kl == [0.0, 0.0]
