"""A checkpoint is whole or absent, whatever happens while it is written."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffexpo.errors import DiffexpoError, ResumeError, StoreError
from diffexpo.training.checkpoint import load_latest, read_tensors, save_checkpoint, write_tensors

TENSORS = {
    "current": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.1, dtype=torch.bfloat16)},
    "adamw_step": {},
}
CALLS = ("write", "fsync", "replace", "open", "mkdir")


def save(folder: Path, step: int) -> Path:
    tensors = {
        group: {name: value + step for name, value in named.items()} for group, named in TENSORS.items()
    }
    return save_checkpoint(folder, tensors, {"step": step, "loss": 0.1 + 0.2})


def newest_step(folder: Path) -> int:
    checkpoint = load_latest(folder, pytest.fail)
    assert checkpoint is not None
    return checkpoint.state["step"]


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    checkpoint = load_latest(tmp_path, pytest.fail)
    assert checkpoint is not None and checkpoint.path == path
    assert checkpoint.state == {"step": 1, "loss": 0.1 + 0.2}
    assert checkpoint.tensors["adamw_step"] == {}
    for name, value in TENSORS["current"].items():
        loaded = checkpoint.tensors["current"][name]
        assert loaded.dtype == value.dtype and torch.equal(loaded, value + 1)


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", pytest.fail) is None
    assert load_latest(tmp_path, pytest.fail) is None


def test_the_last_two_stay(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000004", "checkpoint-000005"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["current.safetensors", "adamw_step.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[1]"),
    ],
    ids=["bit", "gone", "short", "empty", "other"],
)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest / name)
    lines: list[str] = []
    checkpoint = load_latest(tmp_path, lines.append)
    if name == "manifest.json" and damage is flip and not lines:
        pytest.skip("the flipped bit fell on white space")
    assert checkpoint is not None and checkpoint.state["step"] == 1
    assert len(lines) == 1 and str(newest) in lines[0]


def test_when_all_are_damaged_nothing_is_loaded_and_each_is_named(tmp_path: Path) -> None:
    paths = [save(tmp_path, 1), save(tmp_path, 2)]
    for path in paths:
        (path / "state.json").unlink()
    lines: list[str] = []
    assert load_latest(tmp_path, lines.append) is None
    assert [str(path) in line for path, line in zip(reversed(paths), lines, strict=True)] == [True, True]


class Killed(BaseException):
    """Stands for kill -9: no handler of errors sees it."""


@contextmanager
def failing_call(monkeypatch: pytest.MonkeyPatch, index: int, failure: BaseException) -> Iterator[list[str]]:
    """The operating system's call number `index` (of any kind in CALLS) fails; a failing write has written
    half."""
    seen: list[str] = []

    def wrap(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*arguments: object, **named: object) -> object:
            seen.append(name)
            if len(seen) - 1 == index:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise failure
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name))
        yield seen


def test_any_failing_call_is_a_clear_error_and_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "count", 1)
    with failing_call(monkeypatch, -1, Killed()) as calls:
        save(tmp_path / "count", 2)
    assert calls.count("write") >= 4 and calls.count("fsync") >= 6 and calls.count("replace") == 1
    for code in (errno.ENOSPC, errno.EIO):
        # Call 0 makes the folder, which exists: its failure does no harm.
        for index in range(1, len(calls)):
            folder = tmp_path / f"{code}-{index}"
            save(folder, 1)
            message = f"{os.strerror(code)}.*Nothing stored before is lost"
            failing = failing_call(monkeypatch, index, OSError(code, os.strerror(code)))
            with failing as seen, pytest.raises(DiffexpoError, match=message):
                save(folder, 2)
            # Only the very last call, the fsync after the rename, fails with the new checkpoint in place.
            assert newest_step(folder) == (2 if seen[:index].count("replace") else 1)
            assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []
            save(folder, 3)
            assert newest_step(folder) == 3


def test_a_kill_at_any_call_leaves_a_checkpoint_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "count", 1)
    with failing_call(monkeypatch, -1, Killed()) as calls:
        save(tmp_path / "count", 2)
    for index in range(len(calls)):
        folder = tmp_path / str(index)
        save(folder, 1)
        with failing_call(monkeypatch, index, Killed()) as seen, pytest.raises(Killed):
            save(folder, 2)
        assert newest_step(folder) == (2 if seen[:index].count("replace") else 1)
        for leftover in ("checkpoint-000003.tmp", "checkpoint-000009.tmp", ".unfinished-000009"):
            (folder / leftover).mkdir()
        save(folder, 3)
        assert newest_step(folder) == 3
        assert len(list(folder.iterdir())) == 2


def test_a_file_system_that_really_refuses_to_grow_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, {"current": {"a": torch.zeros(10)}}, {"step": 1})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, usual[1]))
    try:
        with pytest.raises(DiffexpoError, match="File too large"):
            save_checkpoint(folder, {"current": {"a": torch.zeros(100_000)}}, {"step": 2})
        with pytest.raises(DiffexpoError, match="File too large"):
            write_tensors(folder / "weights.safetensors", {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert newest_step(folder) == 1
    assert [path.name for path in folder.iterdir()] == ["checkpoint-000001"]


def test_single_files_are_whole_or_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "weights.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left"):
            write_tensors(path, {"a": torch.zeros(3)})
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_every_truncation_of_a_tensor_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {"a": torch.ones(3)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ResumeError, match=r"weights\.safetensors cannot be read"):
            read_tensors(path)
    path.unlink()
    with pytest.raises(ResumeError, match="No such file"):
        read_tensors(path)


def test_the_manifest_names_every_other_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    named = json.loads((path / "manifest.json").read_bytes())["files"]
    assert set(named) | {"manifest.json"} == {item.name for item in path.iterdir()}


def test_every_changed_bit_of_a_tensor_file_is_refused_or_harmless(tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.safetensors", {"a": torch.ones(3), "b": torch.arange(4)}
    write_tensors(path, tensors)
    data = path.read_bytes()
    harmless = 0
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 4
        path.write_bytes(changed)
        try:
            read = read_tensors(path)
        except ResumeError:
            continue
        harmless += 1
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)
    assert harmless < len("diffexpo.sha256__metadata__") + 8, "only the name of the checksum is not guarded"


def test_tensors_of_others_have_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(3)}))
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))
