"""One door to all model families: the folder's own model_index.json says which class reads it."""

from __future__ import annotations

from importlib import import_module

import torch

from diffexpo.config.families import FAMILIES, Family
from diffexpo.config.rules import AUTOCAST_TYPES
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.phases import phase
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.family import FamilyPolicy, Loading
from diffexpo.policies.loading import (
    DTYPES,
    ModelFolder,
    component_folder,
    read_json,
    read_model_folder,
    resolve_folder,
)
from diffexpo.policies.sizes import bucket_shapes, check_areas
from diffexpo.policies.weights import apply_speed_settings

# Parts of pipeline class names that tell another task than text to image.
OTHER_TASKS = {
    "Inpaint": "an inpainting model",
    "Img2Img": "an image-to-image model or a refiner",
    "InstructPix2Pix": "an editing model",
    "ControlNet": "a model with image control",
    "Upscale": "an upscaler",
    "Kontext": "an editing model",
    "Fill": "an inpainting model",
}


@phase("loading the model")
def load_policy(
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    folder_or_id: str,
    seed: int,
    gradient_checkpointing: bool = False,
) -> FamilyPolicy:
    """Load a base model and put trainable weights on it.

    Args:
        model, tuning: The settings.
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
    path = resolve_folder(folder_or_id, revision=model.revision, variant=model.variant)
    folder = read_model_folder(path, model.variant)
    card = find_family(folder)
    _refuse_text_settings(card, model)
    ask = Loading(card, folder, model, tuning, seed, gradient_checkpointing)
    # Damaged files are named before anything is loaded.
    _ = ask.files
    # Only this family's code is imported: each brings networks of its own, a second for all of them.
    policy: FamilyPolicy = import_module(f"diffexpo.policies.{card.name}").load(ask)
    if model.vae_slicing:
        policy.vae.enable_slicing()
    if model.vae_tiling:
        policy.vae.enable_tiling()
    apply_speed_settings(model, policy.weights, policy.device)
    if model.channels_last:
        policy.vae.to(memory_format=torch.channels_last)
    if model.inference_precision != "no":
        policy.inference_dtype = DTYPES[AUTOCAST_TYPES[model.inference_precision]]
    network, factor = policy.weights.network, vae_factor(policy.vae)
    policy.latent_shapes = bucket_shapes(card, network, policy.latent_shape, factor, model, str(path))
    if read_json(component_folder(folder, "scheduler") / "scheduler_config.json").get("use_dynamic_shifting"):
        check_areas(policy.latent_shapes, str(path))
    return policy


def find_family(folder: ModelFolder) -> Family:
    """The card of a folder's family; a PolicyError names the families that are known."""
    card = FAMILIES.get(folder.pipeline_class)
    if card is None:
        what = next((what for part, what in OTHER_TASKS.items() if part in folder.pipeline_class), None)
        raise PolicyError(
            f"{folder.path}: model family {folder.pipeline_class!r} is unknown; expected one of "
            + ", ".join(FAMILIES)
            + (f". This one is {what}; take the text-to-image base model" if what else "")
        )
    return card


def _refuse_text_settings(card: Family, model: ModelConfig) -> None:
    """Raise ConfigError if a setting of T5 is given for a family that it cannot act on."""
    if not card.text_tokens and model.max_sequence_length is not None:
        raise ConfigError(
            f"model.max_sequence_length={model.max_sequence_length}: a {card.pipeline} has no T5 that it "
            "could act on; expected null"
        )
    if not model.drop_t5 or card.optional:
        return
    if not card.text_tokens:
        why = "has no T5 that it could act on; expected false"
    elif card.text_reader == "T5":
        why = "has no text states but T5's; expected false (only Stable Diffusion 3 runs without T5)"
    else:
        why = f"has no T5 ({card.text_reader} reads its texts); expected false"
    raise ConfigError(f"model.drop_t5=true: a {card.pipeline} {why}")
