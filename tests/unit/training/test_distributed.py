"""Two processes do what one does."""

from pathlib import Path

import pytest
import torch

from diffexpo.errors import ConfigError
from diffexpo.training.checkpoint import load_latest, read_tensors
from diffexpo.training.distributed import start_world, stop_world
from diffexpo.training.metrics import read_metrics
from tests.commands import two_processes

from .test_engine import BOUND, assert_close, lines, train
from .tiny import TinyLoader


def run_processes(
    folder: Path, *, contrast: int = 0, stop_rank: int = -1, start: float = 0.0, moved: float = 0.0
) -> list[tuple[int, str]]:
    """Two processes as a launcher starts them: (exit code, stderr) by rank."""
    folder.mkdir(exist_ok=True)
    done = two_processes(
        folder, str(contrast), str(stop_rank), str(start), str(moved), module="tests.unit.training.tiny"
    )
    return [(rank.code, rank.err) for rank in done]


@pytest.mark.usefixtures("float64")
def test_two_processes_end_with_the_weights_and_metrics_of_one(tmp_path: Path) -> None:
    expected, _ = train(tmp_path / "one", steps=6, loader=TinyLoader(10, contrast=3), initial_loss=None)
    for code, error in run_processes(tmp_path / "two", contrast=3):
        assert code == 0, error
    first, second = (read_tensors(tmp_path / "two" / f"weights-{rank}.safetensors") for rank in range(2))
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=BOUND)
    for line, other in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert_close(line, other)


def test_a_stop_on_one_process_stops_all_after_the_same_step_and_they_continue(tmp_path: Path) -> None:
    assert [code for code, _ in run_processes(tmp_path / "whole")] == [0, 0]
    folder = tmp_path / "stopped"
    for code, error in run_processes(folder, stop_rank=1):
        assert code == 0, error
    texts = [(folder / f"stopped-{rank}.txt").read_text() for rank in range(2)]
    # Each process has two micro-batches a step, so the fifth tick falls into step 3.
    assert texts == ["stopped by SIGTERM (iteration 1, step 3 of 6)"] * 2
    checkpoint = load_latest(folder / "checkpoints")
    assert checkpoint is not None and checkpoint.state["step"] == 3
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    assert [code for code, _ in run_processes(folder)] == [0, 0]
    whole, resumed = (
        read_tensors(tmp_path / name / "weights-0.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert lines(folder) == lines(tmp_path / "whole")


def test_processes_with_different_weights_are_refused(tmp_path: Path) -> None:
    for code, error in run_processes(tmp_path, start=0.5):
        assert code == 1 and "the processes start from different weights" in error


def test_all_processes_refuse_a_start_from_another_model_than_the_reference(tmp_path: Path) -> None:
    for code, error in run_processes(tmp_path, moved=1.0):
        assert code == 1 and "the reference is not the model that training starts from" in error


def test_a_single_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start_world(device="cpu")
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    assert not torch.distributed.is_initialized()
    tensor = torch.ones(2)
    world.barrier()
    world.all_reduce_sum([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert world.gather_objects([(1, 0.1), None]) == [[1, 0.1], None]
    stop_world(world)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "'two' is not a number"),
        ({"WORLD_SIZE": "0"}, "'0' is not a number"),
    ],
)
def test_a_number_of_processes_that_is_not_running_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        start_world()


def test_processes_wait_for_one_another_longer_than_any_stage_takes(tmp_path: Path) -> None:
    for rank in two_processes(tmp_path, module="tests.unit.training.patience"):
        assert rank.code == 0, rank.err
        assert rank.out.split() == ["2", "days,", "0:00:00"]
