"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong run.

A checkpoint is a folder `checkpoint-000007` with one safetensors file per group of tensors, `state.json`, and
`manifest.json` (size and SHA-256 of every other file). A folder with this name is complete (see
`diffexpo.files`), and one that is damaged later is found by its checksums and passed over. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffexpo.bounded.texts import parse_json, read_json
from diffexpo.errors import ResumeError, StoreError
from diffexpo.files import TEMPORARY, put, replacing, write_bytes

KEEP = 2
PREFIX = "checkpoint-"
_CHECKSUM = "diffexpo.sha256"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: group -> name -> tensor (on the CPU), and the JSON state."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint after the existing ones, remove all but the newest `KEEP` and return its folder.

    Args:
        folder: Where checkpoints live; made if missing. One writer at a time (the run lock sees to it).
        tensors: group -> name -> tensor; a group becomes `<group>.safetensors`, an empty one too.
        state: JSON values; floats return bit for bit.
    Raises:
        StoreError: the disk is full or fails. The earlier checkpoints are untouched.
    """
    folder = Path(folder)
    # what a killed process left behind; the second name is that of earlier versions
    for leftover in [*folder.glob(f"{PREFIX}*{TEMPORARY}"), *folder.glob(".unfinished-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    number = max((_number(path) for path in _checkpoints(folder)), default=0) + 1
    target = folder / f"{PREFIX}{number:06d}"
    files = {f"{group}.safetensors": _serialise(named) for group, named in tensors.items()}
    files["state.json"] = json.dumps(state, allow_nan=False).encode()
    manifest = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    files["manifest.json"] = json.dumps({"files": manifest}, indent=1).encode()
    try:
        with replacing(target) as temporary:
            temporary.mkdir()
            for name, data in files.items():
                put(temporary / name, data)
    except StoreError as error:
        raise StoreError(f"cannot write checkpoint: {error} Go on with `diffexpo run --resume`.") from error
    for old in _checkpoints(folder)[:-KEEP]:
        # Failing to remove an old checkpoint costs space, not the run.
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(folder: Path, warn: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if there is none (training then starts at step 0).

    `warn` gets one line for each checkpoint that is passed over; by default the log does.
    """
    report = warn or logging.getLogger("diffexpo").warning
    for path in reversed(_checkpoints(Path(folder))):
        try:
            return read_checkpoint(path)
        except ResumeError as error:
            report(f"{error}; falling back to an earlier state")
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and verify every file; a ResumeError names one that is missing, has another
    checksum or cannot be read."""
    try:
        files = read_json(path / "manifest.json")["files"]
        contents = {name: _verified(path / name, entry) for name, entry in files.items()}
        state = parse_json(contents.pop("state.json"))
        tensors = {
            name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in contents.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ResumeError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error
    return Checkpoint(path, tensors, state)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, with a checksum in its header, whole or not at all: after a StoreError (the
    disk is full or fails) an earlier file of this name is untouched."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(Path(path), safetensors.torch.save(plain, metadata={_CHECKSUM: _digest(plain)}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU; ResumeError if it is missing, truncated, another kind, or no
    longer what `write_tensors` wrote."""
    try:
        data = Path(path).read_bytes()
        tensors = safetensors.torch.load(data)
        known = _metadata(data).get(_CHECKSUM)  # files of others have none
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(f"{path} cannot be read ({error}); restore it or start the run again") from error
    if known is not None and known != _digest(tensors):
        raise ResumeError(f"{path} is damaged (its checksum does not match); restore it or start a new run")
    return tensors


def _metadata(data: bytes) -> Mapping[str, str]:
    """The free text in the header of a safetensors file that could be read."""
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found: Mapping[str, str] = header.get("__metadata__", {})
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors on the CPU, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    )


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    data = path.read_bytes()
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} has {len(data)} bytes and does not match its checksum")
    return data


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))
