"""One door to all model families: the folder's own model_index.json says which class reads it."""

from __future__ import annotations

from collections.abc import Callable

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.policies.loading import read_model_folder, resolve_folder
from diffexpo.policies.sd3 import SD3Policy, load_sd3
from diffexpo.policies.unet import UNetPolicy, load_unet

# Pipeline class name in model_index.json -> loader.
POLICIES: dict[str, Callable[..., UNetPolicy | SD3Policy]] = {
    "StableDiffusionPipeline": load_unet,
    "StableDiffusion3Pipeline": load_sd3,
}


def load_policy(
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    folder_or_id: str,
    seed: int,
    gradient_checkpointing: bool = False,
) -> UNetPolicy | SD3Policy:
    """Load a base model and put trainable weights on it.

    Args:
        model: Revision, variant, dtype and device.
        tuning: LoRA or full fine-tuning.
        folder_or_id: A diffusers folder or hub id (aliases are resolved by the caller).
        seed: Run seed; keys the LoRA factors.
        gradient_checkpointing: Recompute activations in the backward pass.
    Returns:
        A policy in eval mode whose "current" weights equal its base bit for bit.
    Raises:
        ConfigError: full fine-tuning of half-precision weights.
        MissingError: no such model, or a component or weight file is not there.
        PolicyError: not a diffusers folder, unknown family, damaged or unfitting weights, LoRA that binds to
            nothing.
    """
    if tuning.kind == "full" and model.dtype != "float32":
        raise ConfigError(
            f"tuning.kind=full with model.dtype={model.dtype}: updates of half-precision weights round away; "
            "expected model.dtype=float32 (training.mixed_precision gives the speed), or tuning.kind=lora"
        )
    folder = read_model_folder(
        resolve_folder(folder_or_id, revision=model.revision, variant=model.variant), model.variant
    )
    if folder.pipeline_class not in POLICIES:
        raise PolicyError(
            f"{folder.path}: model family {folder.pipeline_class!r} is unknown; expected one of "
            f"{', '.join(POLICIES)}"
        )
    return POLICIES[folder.pipeline_class](
        folder, model, tuning, seed=seed, gradient_checkpointing=gradient_checkpointing
    )
