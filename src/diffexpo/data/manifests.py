"""Manifests: one small JSON for each stage and iteration, which marks the stage as complete."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffexpo.bounded.texts import parse_json, read_json
from diffexpo.errors import StoreError
from diffexpo.files import checksum_of, write_text

FORMAT = 3
_READ = (1, 2, FORMAT)  # 1: complete stages keep the files of their units; up to 2: no checksum
# A stage of a lane begins with the lane's name, which is that of a recipe or folder.
_STAGE = r"[^/\\]*[a-z_]"
_NAME = re.compile(rf"(?P<stage>{_STAGE})-(?P<iteration>\d{{4,}})\.json")


def manifest_path(root: Path, stage: str, iteration: int) -> Path:
    """`root/manifests/<stage>-<iteration>.json`."""
    if not re.fullmatch(_STAGE, stage) or iteration < 0:
        raise StoreError(
            f"stage {stage!r} of iteration {iteration!r}: a stage is a name that ends in lower case letters, "
            "an iteration >= 0"
        )
    return root / "manifests" / f"{stage}-{iteration:04d}.json"


def list_manifests(root: Path) -> list[tuple[str, int]]:
    """(stage, iteration) of every manifest, by iteration, then stage."""
    matches = [_NAME.fullmatch(path.name) for path in (root / "manifests").glob("*.json")]
    found = [(match["stage"], int(match["iteration"])) for match in matches if match]
    return sorted(found, key=lambda item: (item[1], item[0]))


def read_manifest(
    root: Path, stage: str, iteration: int
) -> tuple[dict[str, Any], dict[str, dict[str, object]]] | None:
    """(payload, file name -> {"sha256", "rows", "bytes"}), None where there is no manifest; damage, another
    format or another stage's manifest is a StoreError."""
    path = manifest_path(root, stage, iteration)
    if not path.exists():
        return None
    try:
        body = read_json(path)
        if body["format"] not in _READ:
            versions = f"format {body['format']}, this version reads {', '.join(map(str, _READ))}"
            raise StoreError(f"{path} has {versions}; use the version that wrote it")
        digest = body.pop("sha256", "" if body["format"] == FORMAT else None)
        if digest is not None and digest != checksum_of(body):
            raise ValueError("its checksum does not match")
        if (body["stage"], body["iteration"]) != (stage, iteration):
            raise ValueError(f"it is that of {body['stage']} {body['iteration']}")
        return dict(body["payload"]), dict(body["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} is damaged ({error!r}); restore it, or delete it and resume: finished units are kept, "
            "it is written again"
        ) from error


def read_manifests(root: Path, stage: str) -> dict[int, dict[str, Any]]:
    """Payloads of a stage by iteration, in order."""
    found = {
        number: read_manifest(root, stage, number) for name, number in list_manifests(root) if name == stage
    }
    return {number: body[0] for number, body in found.items() if body is not None}


def manifest_files(root: Path, stage: str, iteration: int) -> dict[str, dict[str, object]]:
    """Files that a manifest names; none while there is no manifest."""
    found = read_manifest(root, stage, iteration)
    return found[1] if found else {}


def write_manifest(
    root: Path,
    stage: str,
    iteration: int,
    payload: Mapping[str, object],
    files: Mapping[str, Mapping[str, object]],
) -> Path:
    """Write a manifest whole. An older one may grow; one that would lose a file is a StoreError."""
    path = manifest_path(root, stage, iteration)
    for name, entry in manifest_files(root, stage, iteration).items():
        if files.get(name) != entry:
            raise StoreError(f"{path} names {name}, which has changed or is gone; a manifest can only grow")
    named = {"format": FORMAT, "stage": stage, "iteration": iteration}
    body = parse_json(json.dumps({**named, "payload": _finite(payload), "files": dict(files)}))
    write_text(
        path,
        json.dumps({**body, "sha256": checksum_of(body)}, indent=1, sort_keys=True, allow_nan=False) + "\n",
    )
    return path


def _finite(value: object) -> object:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
