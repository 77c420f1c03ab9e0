"""Whole runs on the accelerator, from offline pairs to the export: every stage, every part that a run may have, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from diffexpo import assembly
from diffexpo.assembly.actions import open_run
from diffexpo.cli.progress import Console
from diffexpo.config import RunConfig, load_config
from diffexpo.errors import Interrupted
from tests.contract.test_contract import Stopping
from tests.device import pretend
from tests.invariants.test_improvement import SETTINGS as IMPROVEMENT
from tests.invariants.test_step_judge import write_recipe
from tests.tiny import tiny_judge
from tests.tiny_step_judge import tiny_step_judge
from tests.world import base_weights, distance, pair_rows, weights

SMALL = [
    "model.device=auto",
    "explore.iterations=2",
    "explore.prompts_per_iteration=2",
    "explore.sampler.steps=2",
    "training.steps=3",
    "training.batch_size=2",
    "training.checkpoint_every=1",
    "evaluation.num_prompts=2",
    "evaluation.sampler.steps=2",
    "evaluation.kl_prompts=1",
    "evaluation.grid_prompts=1",
    "evaluation.vendi_prompts=2",
]


def run(
    recipe: Path,
    folder: Path,
    *settings: str,
    stop_after: str | None = None,
    console: Console | Stopping | None = None,
) -> RunConfig:
    loaded = load_config([str(recipe)], [*SMALL, *settings])
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=(folder / "config.yaml").exists(),
        console=console or Console(),
        stop_after=stop_after,
    )
    return loaded.config


def judged(folder: Path) -> str:
    """A network that judges and has image features."""
    return f"evaluation.judges=[{{name: clip, type: clip, path: {tiny_judge(folder)}}}]"


def last_weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(max((folder / "checkpoints").glob("weights-*.safetensors")))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    return judged(tmp_path_factory.mktemp("judges") / "judge")


@pytest.fixture(scope="module")
def whole(world: Path, judge: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run there, with report and export."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pretend.present():
        run(world / "recipe.yaml", folder, judge)
    return folder


def test_a_whole_run_makes_the_pairs_and_weights_of_the_cpu(
    world: Path, judge: str, whole: Path, tmp_path: Path
) -> None:
    assert any(whole.rglob("report.html"))
    run(world / "recipe.yaml", tmp_path / "usual", judge, "model.device=cpu", stop_after="train-2")
    told = [
        [(row["pair_id"], row["winner_id"], row["loser_id"], row["source"]) for row in pair_rows(folder)]
        for folder in (whole, tmp_path / "usual")
    ]
    assert told[0] == told[1] and any(source == "online" for *_, source in told[0])
    # Attention sums in another order; see tests.world.distance.
    base = base_weights(world / "model")
    assert distance(last_weights(tmp_path / "usual"), last_weights(whole), base) < 1e-2


def test_a_run_that_was_stopped_there_ends_with_the_same_bits(
    world: Path, judge: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="iteration 2, step 1 of 3"):
        run(world / "recipe.yaml", tmp_path / "run", judge, console=Stopping("train 2", 2))
    run(world / "recipe.yaml", tmp_path / "run", judge, stop_after="train-2")
    assert weights(tmp_path / "run") == weights(whole)


def test_its_samples_are_drawn_again_and_its_pairs_exported(
    device: torch.device, whole: Path, tmp_path: Path
) -> None:
    _, store, policy = open_run(whole)
    assert policy.device == device
    for agent in ("main", "exploration"):
        row = next(row for row in store.collected(1) if row.agent == agent)
        assert assembly.regenerate(whole, row.sample_id, tmp_path / "again.png")["latents"] == "identical"
    assert assembly.export_pairs(whole, tmp_path / "pairs.parquet") == len(pair_rows(whole))


UNSEEN = ["evaluation.every_iteration=false", "evaluation.kl_prompts=0"]
LORA = ["tuning.kind=lora", "tuning.lora.rank=4", "tuning.lora.alpha=4"]
VARIANTS = {
    "adapters, merged to draw, in bfloat16": [*LORA, "explore.merge_lora=true", "training.mixed_precision=bf16"],
    "a parked reference in half precision": [
        "training.mixed_precision=bf16", "tuning.reference_dtype=bfloat16", "tuning.reference_device=cpu",
        "algorithm.anchor_weight=0.1", "algorithm.anchor_guidance=2", "training.gradient_checkpointing=true",
    ],
    "an average of weights that every step moves": ["training.ema_decay=0.9", "algorithm.reference=ema", "algorithm.reference_follows=step"],
    "a judge of its own": [*LORA, "rewards=[{name: own, type: denoising, self_judge: {draws: 2}}]"],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_run_may_have_besides_works_there_too(world: Path, name: str, tmp_path: Path) -> None:
    run(world / "recipe.yaml", tmp_path / "run", *UNSEEN, *VARIANTS[name], stop_after="train-2")
    first, last = weights(tmp_path / "run").values()
    assert first != last
    assert assembly.export(tmp_path / "run")


def test_an_improvement_model_is_trained_draws_winners_and_is_swept(
    world: Path, judge: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(
        world / "recipe.yaml",
        folder,
        *IMPROVEMENT,
        *UNSEEN,
        "training.steps=3",
        judge,
        stop_after="train-2",
    )
    assert {row["source"] for row in pair_rows(folder)} >= {"improved"}
    assembly.sweep(folder, text_scales=(1.0,), image_scales=(1.0,), num_prompts=2)
    _, store, _ = open_run(folder)
    row = next(row for row in store.collected(1, stage="improve"))
    assert assembly.regenerate(folder, row.sample_id, tmp_path / "again.png")["latents"] == "identical"


def test_a_step_judge_ranks_noisy_latents(world: Path, tmp_path: Path) -> None:
    recipe = write_recipe(world, tiny_step_judge(tmp_path / "judge"))
    for folder, place in ((tmp_path / "device", "auto"), (tmp_path / "cpu", "cpu")):
        run(
            recipe,
            folder,
            f"model.device={place}",
            "explore.sampler.steps=3",
            "training.micro_batch_size=2",
            *UNSEEN,
            stop_after="train-2",
        )
    assert (
        distance(
            last_weights(tmp_path / "cpu"), last_weights(tmp_path / "device"), base_weights(world / "model")
        )
        < 1e-2
    )
