"""One door to all model families: the folder's own model_index.json says which class reads it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.policies.loading import (
    ModelFolder,
    component_folder,
    read_json,
    read_model_folder,
    resolve_folder,
)
from diffexpo.policies.sizes import bucket_shapes, check_areas, vae_factor
from diffexpo.policies.speed import apply_speed_settings

if TYPE_CHECKING:
    from diffexpo.policies.flux import FluxPolicy
    from diffexpo.policies.pixart import PixArtPolicy
    from diffexpo.policies.sana import SanaPolicy
    from diffexpo.policies.sd3 import SD3Policy
    from diffexpo.policies.sdxl import SDXLPolicy
    from diffexpo.policies.unet import UNetPolicy

    LoadedPolicy = UNetPolicy | SDXLPolicy | SD3Policy | FluxPolicy | PixArtPolicy | SanaPolicy
# Pipeline class name in model_index.json -> the module of this package whose `load` reads it. Only that one
# is imported: each family brings networks of its own, and importing them all takes a second.
POLICIES = {
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
}
# Of these, the families whose text encoders may include T5, or whose text length can be set as T5's can
# (Gemma in SANA).
WITH_T5 = ("StableDiffusion3Pipeline", "FluxPipeline", "PixArtSigmaPipeline", "SanaPipeline")

# Parts of pipeline class names that tell another task.
OTHER_TASKS = {
    "Inpaint": "an inpainting model",
    "Img2Img": "an image-to-image model or a refiner",
    "InstructPix2Pix": "an editing model",
    "ControlNet": "a model with image control",
    "Upscale": "an upscaler",
    "Kontext": "an editing model",
    "Fill": "an inpainting model",
}


def load_policy(
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    folder_or_id: str,
    seed: int,
    gradient_checkpointing: bool = False,
) -> LoadedPolicy:
    """Load a base model and put trainable weights on it.

    Args:
        model: Revision, variant, resolution, precision, device, memory and speed.
        tuning: LoRA or full fine-tuning.
        folder_or_id: A diffusers folder or hub id (aliases are resolved by the caller).
        seed: Run seed; keys the LoRA factors.
        gradient_checkpointing: Recompute activations in the backward pass.
    Returns:
        A policy in eval mode whose "current" weights equal its base bit for bit.
    Raises:
        ConfigError: full fine-tuning of half-precision weights; a resolution or a bucket that does not divide
            or fit.
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
            f"{', '.join(POLICIES)}{_other_task(folder.pipeline_class)}"
        )
    if folder.pipeline_class not in WITH_T5:
        _refuse_t5_settings(folder, model)
    family = import_module(f"diffexpo.policies.{POLICIES[folder.pipeline_class]}")
    policy = family.load(folder, model, tuning, seed=seed, gradient_checkpointing=gradient_checkpointing)
    apply_speed_settings(model, policy.weights, policy.vae, policy.device)
    policy.latent_shapes = _shapes(folder, model, policy)
    return policy


def _shapes(
    folder: ModelFolder, model: ModelConfig, policy: LoadedPolicy
) -> tuple[tuple[int, int, int], ...]:
    """Shapes of the latents of all sizes of a run's pictures; see `Policy` and `HasBuckets`."""
    if not model.buckets:
        return (policy.latent_shape,)
    where = str(folder.path)
    shapes = bucket_shapes(policy.weights.network, policy.latent_shape, vae_factor(policy.vae), model, where)
    if read_json(component_folder(folder, "scheduler") / "scheduler_config.json").get("use_dynamic_shifting"):
        check_areas(shapes, where)
    return shapes


def _other_task(pipeline_class: str) -> str:
    """What a known kind of model is for, when it is not text to image."""
    for part, what in OTHER_TASKS.items():
        if part in pipeline_class:
            return f". This one is {what}; take the text-to-image base model"
    return ""


def _refuse_t5_settings(folder: ModelFolder, model: ModelConfig) -> None:
    """Raise ConfigError if a setting of T5 is given for a family without it."""
    for key, given, default in (
        ("max_sequence_length", model.max_sequence_length, None),
        ("drop_t5", model.drop_t5, False),
    ):
        if given != default:
            raise ConfigError(
                f"model.{key}={given}: a {folder.pipeline_class} has no T5 that it could act on; expected "
                f"{'null' if default is None else 'false'}"
            )
