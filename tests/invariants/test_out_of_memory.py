"""Memory that runs out in each phase of a real run: what is said, the exit code, the state, and the run that goes on afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import PIL.Image
import pytest
import torch

from diffexpo.assembly import objects
from diffexpo.types import Policy
from tests.invariants.conftest import diffexpo, pair_rows, run_arguments, weights
from tests.unit.cli.test_main import call

Fault = Callable[[Policy], None]


def allocate_too_much(*_: object, **__: object) -> None:
    """What a machine without enough memory does."""
    torch.empty(2**50)


def inject(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """The run's own policy, with a fault put into it when it is loaded."""
    load = objects.load_policy

    def load_with_fault(*arguments: object, **settings: object) -> Policy:
        policy = load(*arguments, **settings)
        fault(policy)
        return policy

    monkeypatch.setattr(objects, "load_policy", load_with_fault)


def state(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["state"]


def fail_in_drawing(policy: Policy) -> None:
    policy.weights.base_module.register_forward_pre_hook(allocate_too_much)


def fail_in_training(policy: Policy) -> None:
    """In the fourth step of the first iteration: two micro-batches a step, and one for the start-up check."""
    calls: list[None] = []

    def hook(*_: object) -> None:
        calls.append(None)
        if torch.is_grad_enabled() and len(calls) > 8:
            torch.empty(2**50)

    policy.weights.network.register_forward_pre_hook(hook)


def fail_in_decoding(policy: Policy) -> None:
    policy.vae.decode = allocate_too_much


def fail_in_reading(policy: Policy) -> None:
    policy.text_encoder.register_forward_pre_hook(allocate_too_much)


def fail_in_encoding(policy: Policy) -> None:
    policy.vae.encode = allocate_too_much


@pytest.mark.parametrize(
    ("fault", "phase", "advice"),
    [
        (fail_in_encoding, "encoding images", "model.vae_slicing=true"),
        (fail_in_reading, "encoding prompts", "tuning.kind=lora"),
        (fail_in_drawing, "drawing images", "explore.batch_size=2"),
        (fail_in_decoding, "decoding images", "model.vae_slicing=true"),
    ],
)
def test_each_phase_is_named_with_what_helps_there(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
    phase: str,
    advice: str,
) -> None:
    inject(monkeypatch, fault)
    code, _, err = call(capsys, *run_arguments(world, tmp_path / "run"))
    assert code == 4 and f"error: out of memory while {phase}: 4.194e+06 GiB asked for" in err
    assert advice in err and "Traceback" not in err and "defect" not in err
    assert f"diffexpo run --resume {tmp_path / 'run'}" in err
    assert state(tmp_path / "run") == "failed"


def test_loading_and_scoring(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_cuda(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.64 GiB of which 5.00 MiB is free."
        )

    arguments = run_arguments(world, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(diffusers.UNet2DConditionModel, "from_pretrained", raise_cuda)
        code, _, err = call(capsys, *arguments)
    assert (
        code == 4
        and "out of memory while loading the model: 20.00 MiB asked for, 5.00 MiB of 23.64 GiB free" in err
    )
    assert state(tmp_path / "run") == "failed"
    with monkeypatch.context() as patched:
        patched.setattr(PIL.Image.Image, "save", raise_cuda)
        code, _, err = call(capsys, *arguments)
    assert (
        code == 4 and "out of memory while scoring images" in err and "explore.overlap_scoring=false" in err
    )


def test_a_run_that_ran_out_while_training_goes_on_bit_for_bit(
    world: Path,
    truth: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    inject(monkeypatch, fail_in_training)
    code, _, err = call(capsys, *run_arguments(world, folder))
    assert code == 4 and "out of memory while training" in err
    assert f"diffexpo run --resume {folder} --set SETTING" in err and "training.micro_batch_size=1" in err
    assert "out of memory while training" in (folder / "log.txt").read_text()
    assert state(folder) == "failed"
    assert list(folder.glob("checkpoints/iteration-0001/checkpoint-*")), (
        "it failed before there was anything to keep"
    )
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    diffexpo("run", "--resume", folder)
    assert weights(folder) == weights(truth) and pair_rows(folder) == pair_rows(truth)
    assert state(folder) == "finished"
    # As advised: checkpoints of the larger micro-batches are continued with smaller ones.
    smaller = ("--set", "training.micro_batch_size=1")
    diffexpo("run", "--resume", other, *smaller, "--stop-after", "train-1")
    assert list(weights(other)) == list(weights(truth))[:1] and state(other) == "stopped"


def test_whatever_else_ends_a_run_leaves_it_failed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def divide(policy: Policy) -> None:
        policy.weights.base_module.register_forward_pre_hook(lambda *_: 1 // 0)

    inject(monkeypatch, divide)
    code, _, err = call(capsys, *run_arguments(world, tmp_path / "run"))
    assert code == 4 and "ZeroDivisionError" in err and "this is a defect" in err
    assert state(tmp_path / "run") == "failed"
