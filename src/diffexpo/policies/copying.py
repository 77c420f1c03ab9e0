"""What a whole pipeline's export takes over from its base byte for byte: everything but the denoiser. Files
that are written anew would be those of this version of the libraries, which older tools may not read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from diffexpo.files import write_bytes, write_text
from diffexpo.policies.loading import ModelFolder, variant_of, weight_files
from diffexpo.policies.text import SETTINGS_FILE

WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".ckpt", ".onnx", ".onnx_data", ".pb", ".xml")
SHARDS = (".safetensors.index", ".bin.index", ".msgpack.index")


def copy_untrained(base: ModelFolder, folder: Path, denoiser: str, without: Collection[str]) -> None:
    """Copy a pipeline's components but the denoiser to another folder, with its index and settings.

    Weights are those of the variant in use, under the plain variant's names; components `without` which the
    model runs are named as absent, as diffusers does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = {name: [None, None] if name in without else entry for name, entry in base.index.items()}
    if "safety_checker" in without:
        index["requires_safety_checker"] = False
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    if (base.path / SETTINGS_FILE).is_file():
        shutil.copyfile(base.path / SETTINGS_FILE, folder / SETTINGS_FILE)
    for component in index:
        if base.has(component) and component not in (denoiser, *without):
            _copy_component(base.path / component, folder / component, base.variant)


def _copy_component(source: Path, target: Path, variant: str | None) -> None:
    """The component's own files, and of its weights those of one variant."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        to = target / file.relative_to(source)
        if not file.name.endswith(WEIGHTS) and not any(mark in file.name for mark in SHARDS):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
    if not any(source.glob("*.safetensors")):
        return
    variant = variant_of(source, variant)
    mark = f".{variant}" if variant else ""
    for file in weight_files(source, variant):
        shutil.copyfile(file, target / file.name.replace(mark, ""))
    shards = f"*.safetensors.index{mark}.json"
    for file in [*source.glob(shards), *(source.glob(f"*{mark}.safetensors.index.json") if mark else ())]:
        write_bytes(target / file.name.replace(mark, ""), file.read_bytes().replace(mark.encode(), b""))
