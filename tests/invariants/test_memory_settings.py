"""Merged drawing, a half-precision reference, and drawing in another precision and layout through the real command: killed and resumed, drawn again, compared with plain runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from diffexpo import assembly
from diffexpo.data.store import Store
from diffexpo.training.checkpoint import read_tensors
from tests.invariants.conftest import SIGKILL, diffexpo, kill_when, pair_rows, run_arguments, weights


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


SHORT = sets("explore.iterations=2", "training.steps=4", "evaluation.kl_prompts=0")
LORA = [
    *SHORT,
    *sets("tuning.kind=lora", "tuning.lora.rank=4", "tuning.lora.alpha=3", "explore.merge_lora=true"),
]
BF16 = [*SHORT, *sets("training.mixed_precision=bf16")]
FAST = [*SHORT, *sets("model.inference_precision=bf16", "model.channels_last=true")]
HELD = sets("algorithm.reference=ema", "algorithm.anchor_weight=0.1", "algorithm.anchor_guidance=2")
HALF = sets("tuning.reference_dtype=bfloat16", "tuning.reference_device=cpu")


@pytest.fixture(scope="module")
def merged(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run that draws with merged adapters."""
    folder = tmp_path_factory.mktemp("merged") / "run"
    diffexpo(*run_arguments(world, folder), *LORA, "--stop-after", "train-2")
    return folder


def test_a_killed_run_with_merged_drawing_ends_with_the_same_bits(
    world: Path, merged: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*run_arguments(world, folder), *LORA]
    assert kill_when(arguments, lambda: any(folder.glob("store/**/samples-0001-*")), SIGKILL) == -9
    diffexpo("run", "--resume", folder)
    assert weights(folder) == weights(merged)
    assert pair_rows(folder) == pair_rows(merged)


def test_its_samples_are_drawn_again_bit_for_bit(merged: Path, tmp_path: Path) -> None:
    rows = Store(merged / "store", create=False).samples(1)
    for agent in ("main", "exploration"):
        row = next(row for row in rows if row.agent == agent)
        assert json.loads(row.sampler)["merged"] is True
        found = assembly.regenerate(merged, row.sample_id, tmp_path / "out.png")
        assert found["latents"] == "identical", found


def test_a_killed_run_in_another_precision_and_layout_ends_with_the_same_bits(
    world: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    diffexpo(*run_arguments(world, whole), *FAST, "--stop-after", "train-2")
    arguments = [*run_arguments(world, folder), *FAST]
    assert kill_when(arguments, lambda: any(folder.glob("store/**/samples-0001-*")), SIGKILL) == -9
    moment = "checkpoints/iteration-0002/checkpoint-*"
    resumed = ["run", "--resume", str(folder)]
    assert kill_when(resumed, lambda: any(folder.glob(moment)), SIGKILL) == -9
    diffexpo(*resumed)
    assert weights(folder) == weights(whole)
    assert pair_rows(folder) == pair_rows(whole)


@pytest.mark.parametrize("method", [[], HELD], ids=["base", "average and anchor"])
def test_a_half_precision_reference_gives_the_weights_of_float32(
    world: Path, tmp_path: Path, method: list[str]
) -> None:
    """Also where the setting is only made on resuming, and after a kill."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    diffexpo(*run_arguments(world, whole), *BF16, *method, "--stop-after", "train-2")
    diffexpo(*run_arguments(world, half), *BF16, *method, "--stop-after", "train-1")
    moment = "checkpoints/iteration-0002/checkpoint-*"
    assert kill_when(["run", "--resume", str(half), *HALF], lambda: any(half.glob(moment)), SIGKILL) == -9
    diffexpo("run", "--resume", half)
    assert weights(half) == weights(whole)
    assert pair_rows(half) == pair_rows(whole)
    settings = yaml.safe_load((half / "config.yaml").read_text())
    assert settings["tuning"]["reference_dtype"] == "bfloat16"


def test_a_resumed_run_goes_on_with_smaller_micro_batches(world: Path, truth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    diffexpo(*run_arguments(world, folder), "--stop-after", "train-1")
    before = (folder / "config.yaml").read_text()
    refused = diffexpo("run", "--resume", folder, "--set", "training.learning_rate=1", check=False)
    assert refused.code == 2 and "results depend on it" in refused.message
    assert (folder / "config.yaml").read_text() == before
    smaller = ("--set", "training.micro_batch_size=1")
    done = diffexpo("run", "--resume", folder, *smaller, "--stop-after", "train-2")
    assert "goes on with training.micro_batch_size=1" in done.out
    origins = (folder / "config.source.yaml").read_text()
    assert "training.micro_batch_size: --set training.micro_batch_size=1, on resuming\n" in origins
    assert origins.count("seed:") == 1
    first, second = (f"checkpoints/weights-{number:04d}.safetensors" for number in (1, 2))
    assert weights(folder)[Path(first).name] == weights(truth)[Path(first).name], (
        "that iterate was trained before"
    )
    # The second was trained with other sums of the same terms.
    ours, theirs, start = (as_vector(path) for path in (folder / second, truth / second, truth / first))
    difference = torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs - start)
    assert 0 < difference < 1e-3


def as_vector(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for _, tensor in sorted(read_tensors(path).items())])
