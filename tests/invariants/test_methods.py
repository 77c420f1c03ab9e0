"""Every method on images: a batch may be cut anywhere, two halves of a pair are a pair, a stopped iteration goes on bit for bit,
and a run ends with what it must, on diffusion and on flow models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexpo import assembly
from diffexpo.cli.progress import Console
from diffexpo.config import RunConfig, load_config
from diffexpo.config.schema import TrainingConfig
from diffexpo.data.store import Store
from diffexpo.errors import Interrupted
from diffexpo.online.cost import row_cost
from diffexpo.policies.toy import ToyPolicy
from diffexpo.training.checkpoint import load_latest
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter, read_metrics
from diffexpo.types import PairBatch, ScoredBatch
from tests.tiny import tiny_flow
from tests.unit.algorithms.methods import PATHS, ROWS, SETTINGS, make, make_batch, settings_of

STEPS = 3


class Batches:
    """Another batch of the method's kind at every step."""

    def __init__(self, name: str, policy: ToyPolicy) -> None:
        self.name, self.policy = name, policy

    def batch(self, step: int) -> PairBatch | ScoredBatch:
        return make_batch(self.name, self.policy, step)


def train(
    name: str,
    folder: Path,
    *,
    kind: str = "vp",
    micro: int = ROWS,
    tick: Callable[[], None] = lambda: None,
    training: dict[str, object] | None = None,
    **changes: object,
) -> ToyPolicy:
    """A few steps of the engine itself, from weights equal to the reference's."""
    policy = ToyPolicy(PATHS[kind])
    values = {"batch_size": ROWS, "micro_batch_size": micro, "learning_rate": 1e-3, "checkpoint_every": 1}
    settings = TrainingConfig.model_validate(values | (training or {}))
    metrics = MetricsWriter(folder / "metrics.jsonl")
    engine = Engine(policy, make(name, policy, **changes), settings, metrics)
    engine.train_iteration(
        1, Batches(name, policy), steps=STEPS, checkpoint_dir=folder / "c", run_seed=0, tick=tick
    )
    return policy


def flat(policy: ToyPolicy, version: str = "current") -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in policy.weights.state(version).values()])


def assert_close_beside_the_movement(one: ToyPolicy, other: ToyPolicy) -> None:
    movement = np.linalg.norm(flat(one) - flat(one, "base"))
    assert movement > 0
    assert np.linalg.norm(flat(one) - flat(other)) < 1e-3 * movement


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_do_not_change_the_result(name: str, tmp_path: Path) -> None:
    """In float32; `test_every_split` has the sharper bounds of float64, and two processes."""
    whole = train(name, tmp_path / "whole", kind="flow")
    parts = train(name, tmp_path / "parts", kind="flow", micro=1)  # DGPO: one group at a time
    assert_close_beside_the_movement(whole, parts)
    for one, other in zip(
        *(read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")), strict=True
    ):
        assert one.keys() == other.keys()
        for metric in one.keys() - {"wall_s", "phase"}:
            assert one[metric] == pytest.approx(other[metric], rel=2e-3, abs=2e-4), metric


@pytest.mark.parametrize("name", ["diffusion_dpo", "spin", "mapo", "orpo"])
def test_two_passes_do_not_change_the_result(name: str, tmp_path: Path) -> None:
    joint = train(name, tmp_path / "joint")
    halves = train(name, tmp_path / "halves", micro=4, training={"pair_gradient": "two_pass"})
    assert_close_beside_the_movement(joint, halves)


@pytest.mark.parametrize("decay", ["iteration", 1, 2])
def test_a_stopped_nft_iteration_goes_on_with_its_old_policy_bit_for_bit(
    decay: str | int, tmp_path: Path
) -> None:
    whole = train("diffusion_nft", tmp_path / "whole", old_decay=decay)
    ticks = 0

    def stop() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        train("diffusion_nft", tmp_path / "parts", tick=stop, old_decay=decay)
    saved = load_latest(tmp_path / "parts" / "c", lambda text: None)
    assert saved is not None and saved.state["step"] == 1 and "old" in saved.tensors
    parts = train("diffusion_nft", tmp_path / "parts", old_decay=decay)
    assert [parts.weights.fingerprint(version) for version in ("current", "old")] == [
        whole.weights.fingerprint(version) for version in ("current", "old")
    ]
    is_held = whole.weights.fingerprint("old") == whole.weights.fingerprint("base")
    assert is_held is (decay == "iteration")


class CountingPolicy(ToyPolicy):
    """Counts rows of every forward, and of those that a backward follows."""

    forwards = backwards = 0

    def predict(self, x_t, t, conditioning):
        import torch

        self.forwards += len(x_t)
        self.backwards += len(x_t) if torch.is_grad_enabled() else 0
        return super().predict(x_t, t, conditioning)


COSTS = {
    **{name: (name, {}, "joint") for name in SETTINGS},
    "simpo": ("diffusion_dpo", {"kind": "simpo"}, "joint"),
    "automatic beta": ("diffusion_dpo", {"auto_beta": True}, "joint"),
    "two passes": ("diffusion_dpo", {}, "two_pass"),
    "no clip": ("dgpo", {"clip_range": None}, "joint"),
    "no kl": ("awm", {"kl_weight": 0.0}, "joint"),
}


@pytest.mark.parametrize(("name", "changes", "gradient"), COSTS.values(), ids=COSTS.keys())
def test_the_cost_of_a_row_is_what_a_step_does(
    name: str, changes: dict[str, object], gradient: str, tmp_path: Path
) -> None:
    policy = CountingPolicy(PATHS["vp"])
    training = TrainingConfig(
        batch_size=ROWS, micro_batch_size=ROWS, learning_rate=1e-3, pair_gradient=gradient
    )
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    engine = Engine(policy, make(name, policy, **changes), training, metrics)
    engine.train_iteration(1, Batches(name, policy), steps=1, checkpoint_dir=tmp_path / "c", run_seed=0)
    config = RunConfig().model_copy(update={"algorithm": settings_of(name, **changes), "training": training})
    assert policy.forwards + 2 * policy.backwards == ROWS * row_cost(config)


# ---- whole runs ------------------------------------------------------------------------------------------------

OWN = ["offline.source=null", "hybrid.decay=0", "explore.agents=1"]
# Two iterations train where offline pairs teach first; the others train from the second iteration on.
RUNS = {
    "sft": ["algorithm.type=sft", "explore.iterations=1"],
    "raft": ["algorithm.type=sft", "algorithm.keep=best", "offline.source=null"],
    "diffusion_kto": ["algorithm.type=diffusion_kto", "explore.iterations=2"],
    "guidance_distillation": [
        "algorithm.type=guidance_distillation", "explore.agents=1", "offline.source=null", "rewards=[]",
    ],
    "rwr": ["algorithm.type=rwr", "algorithm.temperature=0.3", "offline.source=null"],
    "mapo": ["algorithm.type=mapo", "training.pair_gradient=two_pass", "explore.iterations=2"],
    "orpo": ["algorithm.type=orpo", "training.pair_gradient=two_pass", "explore.iterations=2"],
    "diffusion_nft": ["algorithm.type=diffusion_nft", "algorithm.old_decay=1", *OWN],
    "awm": ["algorithm.type=awm", "algorithm.kl_weight=0.1", *OWN],
    "dgpo": ["algorithm.type=dgpo", "algorithm.clip_range=0.1", "explore.iterations=2"],
    "spin": [
        "algorithm.type=spin", "explore.agents=1", "hybrid={offline_weight: 0, decay: 0}", "rewards=[]",
    ],
}  # fmt: skip
SMALL = [
    "explore.iterations=3",
    "explore.negatives.source=null",
    "training.steps=2",
    "training.batch_size=8",
    "training.micro_batch_size=4",
    "evaluation.every_iteration=false",
    "evaluation.num_prompts=1",
    "evaluation.kl_prompts=0",
    "evaluation.grid_prompts=1",
]


def run(world: Path, folder: Path, settings: list[str], stop_after: str | None = None) -> RunConfig:
    # Settings of the world's own method are null before another one is chosen.
    loaded = load_config([str(world / "recipe.yaml")], [*SMALL, *settings])
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=False,
        console=Console(),
        stop_after=stop_after,
    )
    return loaded.config


@pytest.mark.parametrize("name", RUNS)
def test_a_method_runs_whole(name: str, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = run(world, folder, RUNS[name])
    last = config.explore.iterations
    weights = [load_file(folder / "checkpoints" / f"weights-{t:04d}.safetensors") for t in range(1, last + 1)]
    base = load_file(world / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(np.abs(base[key] - value).max() > 0 for key, value in weights[-1].items())
    trained = [row for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "train"]
    first = 1 if name in ("sft", "diffusion_kto", "mapo", "orpo", "dgpo") else 2
    assert sorted({row["iteration"] for row in trained}) == list(range(first, last + 1))
    assert all(row["train/loss"] is not None and row["train/skipped_steps"] == 0 for row in trained)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flow(tmp_path_factory.mktemp("flow") / "model")


@pytest.mark.parametrize(
    "name", ["orpo", "diffusion_kto", "rwr", "diffusion_nft", "awm", "dgpo", "spin", "guidance_distillation"]
)
def test_flow_models_learn_by_the_same_methods(
    name: str, world: Path, flow_model: Path, tmp_path: Path
) -> None:
    flow = [
        f"model.path={flow_model}",
        "explore.sampler.name=flow_euler",
        "evaluation.sampler.name=flow_euler",
        "explore.iterations=2",
    ]
    folder = tmp_path / "run"
    run(world, folder, [*RUNS[name], *flow], stop_after="train-2")
    losses = [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "train"]
    assert losses and all(loss is not None for loss in losses)


def test_spin_sets_data_against_own_images_of_the_same_prompt(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = run(world, folder, [*RUNS["spin"], "explore.iterations=2"], stop_after="pair-1")
    store = Store(folder / "store")
    winners: dict[str, set[str]] = {}
    for row in store.pairs(source="offline"):
        winners.setdefault(row.prompt, set()).add(row.winner_id)
    pairs = store.pairs(1)
    own = {row.sample_id: row for row in store.samples(1)}
    assert (
        len(pairs) == len(own) == config.explore.prompts_per_iteration * 2 * config.explore.images_per_prompt
    )
    assert {row.loser_id for row in pairs} == set(own)
    for row in pairs:
        assert row.source == "self_play"
        assert row.winner_id in winners[row.prompt] and own[row.loser_id].prompt == row.prompt
