"""What a method learns does not depend on how its batches are split: 1 x 8, 8 x 1 and 2 processes x 4 give the same weights.

All methods, with whatever they take from more than one row: the automatic beta of a batch, Diffusion-KTO's baseline, advantages
of groups, DDPO's running rewards, DPOK's learned baseline, DGPO's and PRDP's whole groups, the old policy that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.training.metrics import read_metrics
from tests.commands import module_in_two_processes
from tests.invariants.every_method import METHODS, run

ITERATIONS = (1, 2)
# Sums of float64 in another order, over a few updates of size 1e-3 and more.
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's run in one process with whole batches, made when first asked for."""
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            run(name, root)
        return root / name

    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all methods run by two processes, which are started once for all."""
    root = tmp_path_factory.mktemp("two")
    module_in_two_processes("tests.invariants.every_method", root)
    return root


@pytest.mark.parametrize("name", METHODS)
def test_eight_micro_batches_of_1_are_one_of_8(
    name: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run(name, tmp_path, micro_batch_size=1)
    assert_same_run(tmp_path / name, whole(name))


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_with_4_rows_are_one_with_8(
    name: str, whole: Callable[[str], Path], two_processes: Path
) -> None:
    assert_same_run(two_processes / name, whole(name))


@pytest.mark.parametrize("name", ["automatic beta", "diffusion_kto", "mean of classes"])
def test_a_statistic_of_each_micro_batch_alone_would_be_seen(
    name: str, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = METHOD_BY_NAME[str(METHODS[name][1]["type"])]
    monkeypatch.setattr(card, "measures_batch", False)
    run(name, tmp_path, micro_batch_size=4)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / name, whole(name))


def assert_same_run(folder: Path, expected: Path) -> None:
    """The same weights after each iteration, and the same metrics of each step."""
    first, second = (weights(expected, iteration) for iteration in ITERATIONS)
    assert np.abs(second - first).max() > 1e-3, "the last iteration must have moved something"
    for iteration in ITERATIONS:
        residual = weights(folder, iteration) - weights(expected, iteration)
        assert np.abs(residual).max() < TOLERANCE
    ours, theirs = (training_lines(path) for path in (folder, expected))
    assert len(ours) == len(theirs) > 0
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


def weights(folder: Path, iteration: int) -> np.ndarray:
    tensors = load_file(folder / "checkpoints" / f"weights-{iteration:04d}.safetensors")
    assert all(tensor.dtype == np.float64 for tensor in tensors.values())
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def training_lines(folder: Path) -> list[dict[str, float]]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["phase"] == "train"]
    return [{name: value for name, value in row.items() if name not in ("wall_s", "phase")} for row in rows]


def test_every_method_is_here() -> None:
    assert {str(algorithm["type"]) for _, algorithm, _ in METHODS.values()} | {"improvement_dpo"} >= set(
        METHOD_BY_NAME
    )
