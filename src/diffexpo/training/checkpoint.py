"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong run.

A checkpoint is a folder `checkpoint-000007` with one safetensors file per group of tensors, `state.json`, and
`manifest.json` (size and SHA-256 of every other file). It is written under a temporary name, every file and
folder is fsynced, and the rename comes last; so a folder with the final name is complete, and one that is
damaged later is found by its checksums and passed over. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from diffexpo.data.files import write_whole
from diffexpo.errors import DiffexpoError, ResumeError

KEEP = 2
PREFIX, TEMPORARY = "checkpoint-", ".unfinished-"
CHUNK = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: group -> name -> tensor (on the CPU), and the JSON state."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = KEEP
) -> Path:
    """Write a checkpoint behind the existing ones and remove all but the newest `keep`.

    Args:
        folder: Where checkpoints live; made if missing. One writer at a time (the run lock sees to it).
        tensors: group -> name -> tensor; a group becomes `<group>.safetensors`, an empty one too.
        state: JSON values; floats return bit for bit.
        keep: How many checkpoints stay, >= 1.
    Returns:
        The new checkpoint's folder.
    Raises:
        DiffexpoError: the disk is full or fails. The earlier checkpoints are untouched.
    """
    folder = Path(folder)
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        number = max((_number(path) for path in _checkpoints(folder)), default=0) + 1
        target = folder / f"{PREFIX}{number:06d}"
        temporary = folder / f"{TEMPORARY}{number:06d}"
        temporary.mkdir()
        files = {f"{group}.safetensors": _serialise(named) for group, named in tensors.items()}
        files["state.json"] = json.dumps(state, allow_nan=False).encode()
        manifest = {name: _write_file(temporary / name, data) for name, data in files.items()}
        _write_file(temporary / "manifest.json", json.dumps({"files": manifest}, indent=1).encode())
        _sync_folder(temporary)
        os.rename(temporary, target)
        _sync_folder(folder)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _disk_error(f"checkpoint in {folder}", error) from error
    for old in _checkpoints(folder)[:-keep]:
        # Failing to remove an old checkpoint costs space, not the run.
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(folder: Path, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole.

    Args:
        folder: Where checkpoints live; may be missing.
        warn: Gets one line for each checkpoint that is passed over; default: the log.
    Returns:
        The checkpoint, or None if there is no valid one (training then starts at step 0 and ends with the
        same weights).
    """
    report = warn or logging.getLogger("diffexpo").warning
    for path in reversed(_checkpoints(Path(folder))):
        try:
            return read_checkpoint(path)
        except ResumeError as error:
            report(f"{error}; falling back to an earlier state")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every file.

    Raises:
        ResumeError: a file is missing, has another checksum or cannot be read; the message names it.
    """
    try:
        files = json.loads((path / "manifest.json").read_bytes())["files"]
        contents = {name: _verified(path / name, entry) for name, entry in files.items()}
        state = json.loads(contents.pop("state.json"))
        tensors = {
            name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in contents.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ResumeError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error
    return Checkpoint(path, tensors, state)


def remove_checkpoints(folder: Path) -> None:
    """Remove a folder of checkpoints that nobody needs any more; missing is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file atomically: temporary name, fsync, rename.

    Raises:
        StoreError: the disk is full or fails; an earlier file of this name is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _serialise(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        ResumeError: the file is missing, truncated or not safetensors.
    """
    try:
        return safetensors.torch.load(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{path} cannot be read ({error}); restore it or start the run anew") from error


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


def _write_file(path: Path, data: bytes) -> dict[str, int | str]:
    """Write, fsync, and return the manifest entry."""
    view = memoryview(data)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        done = 0
        while done < len(view):
            done += os.write(descriptor, view[done : done + CHUNK])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": len(view), "sha256": hashlib.sha256(view).hexdigest()}


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = path.read_bytes()
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} has {len(data)} bytes and does not match its checksum")
    return data


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def _disk_error(what: str, error: OSError) -> DiffexpoError:
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    return DiffexpoError(
        f"cannot write {what}: {error.strerror} ({name}); what was saved before is intact: "
        "free space or repair the disk, then continue with `diffexpo run --resume`"
    )
