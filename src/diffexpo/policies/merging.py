"""A base model with a LoRA merged into it, as a folder: what plain diffusers reads of a LoRA file counts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from diffexpo.errors import PolicyError
from diffexpo.phases import phase
from diffexpo.policies.export import PEFT_FILE
from diffexpo.policies.family import class_of
from diffexpo.policies.loading import DTYPES, LOAD_ERRORS, ModelFolder
from diffexpo.policies.text import SETTINGS_FILE

ADAPTER = "merged"
_DOWN = re.compile(r"(\.lora_A\.|\.lora_down\.|\.lora\.down\.|_lora\.down\.|lora_linear_layer\.down\.)")


@phase("merging a LoRA")
def merge_lora(model: ModelFolder, file: Path, scale: float, dtype: str, target: Path | None) -> None:
    """Write the whole pipeline with a LoRA (diffusers', kohya's or peft's layout) folded into its weights.

    Args:
        model: The base.
        file: Of `require_lora`.
        scale: What the LoRA's update is multiplied by.
        dtype: Precision of the weights that are merged and written.
        target: Folder to write, in the diffusers layout; None: only look whether it fits.
    Raises:
        PolicyError: the LoRA does not fit the base, in part or at all.
    """
    settings: dict[str, Any] = {
        name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in model.index
    }
    if "safety_checker" in settings:
        settings["requires_safety_checker"] = False
    try:
        pipeline = class_of(model.pipeline_class).from_pretrained(
            str(model.path), dtype=DTYPES[dtype], variant=model.variant, local_files_only=True, **settings
        )
        pipeline.set_progress_bar_config(disable=True)
        _merge(pipeline, file, scale)
    except LOAD_ERRORS as error:
        why = " ".join(str(error).split())[:300]
        raise PolicyError(
            f"LoRA {file}: does not fit {model.path} ({why}); it was made for another model"
        ) from error
    if target is None:
        return
    pipeline.save_pretrained(str(target), safe_serialization=True)
    own = model.path / SETTINGS_FILE
    if own.is_file():
        (target / SETTINGS_FILE).write_bytes(own.read_bytes())


def _merge(pipeline: DiffusionPipeline, file: Path, scale: float) -> None:
    if file.name == PEFT_FILE:
        wrapped = PeftModel.from_pretrained(pipeline.transformer, str(file.parent))
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
        _check(pipeline, file)
        pipeline.transformer = wrapped.merge_and_unload()
        return
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
    _check(pipeline, file)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()


def _check(pipeline: DiffusionPipeline, file: Path) -> None:
    """Raise PolicyError unless every module that the LoRA changes is one of the model's."""
    networks = [part for part in pipeline.components.values() if hasattr(part, "modules")]
    bound = sum(isinstance(layer, LoraLayer) for part in networks for layer in part.modules())
    with safe_open(file, framework="pt") as tensors:
        named = sum(_DOWN.search(key) is not None for key in tensors.keys())  # noqa: SIM118
    if bound == 0 or bound < named:
        raise PolicyError(
            f"LoRA {file}: of the {named} modules that it changes the model has {bound}; it is another's"
        )
