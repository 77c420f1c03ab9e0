"""Hand a trained version to plain diffusers, and refuse to say "saved" before plain diffusers has drawn the
same picture.

A LoRA file is `B' A` with the scale alpha / rank folded into B' (so that loaders which ignore metadata
agree), written by the pipeline class's own `save_lora_weights`, with the adapter's configuration and the
usual `modelspec.*` and `ss_*` keys in the header.
"""

from __future__ import annotations

import datetime
import json
import math
import shutil
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from diffexpo.errors import PolicyError
from diffexpo.policies.loading import LOAD_ERRORS
from diffexpo.policies.sd3 import SETTINGS_FILE, SD3Policy
from diffexpo.policies.unet import UNetPolicy
from diffexpo.policies.weights import fingerprint_state
from diffexpo.rng import torch_generator

LORA_FILE = "pytorch_lora_weights.safetensors"
# Largest difference of outputs allowed, relative to the largest value: matrix kernels of some CPUs round by where a
# tensor lies in memory. Folding a scale that is not a power of two rounds once more. Trained weights must be equal.
TOLERANCE = 1e-5
PROBE_PROMPT = "a photo"
Pipeline = StableDiffusionPipeline | StableDiffusion3Pipeline


def export_policy(policy: UNetPolicy | SD3Policy, version: str, folder: Path) -> dict[str, object]:
    """Export a version as its tuning kind says: a LoRA file or a whole pipeline folder. See `export_lora`,
    `export_full`.
    """
    if policy.weights.kind == "lora":
        return export_lora(policy, version, folder)
    return export_full(policy, version, folder)


def export_lora(policy: UNetPolicy | SD3Policy, version: str, folder: Path) -> dict[str, object]:
    """Write `pytorch_lora_weights.safetensors` and compare a fresh plain-diffusers pipeline that loads it.

    Args:
        policy: A policy with LoRA weights.
        version: Which version.
        folder: Where to; made if absent.
    Returns:
        kind, version, file, sha256 of the tensors, base fingerprint, and the largest relative differences
        `forward_difference` and `image_difference` (0 when alpha / rank is a power of two).
    Raises:
        PolicyError: not a LoRA policy, or the reloaded model differs.
    """
    if policy.weights.kind != "lora":
        raise PolicyError(
            "export_lora: the policy has no adapters (tuning.kind=full); expected tuning.kind=lora"
        )
    weights = policy.weights
    scale = weights.alpha / weights.rank
    tensors = {
        name: (tensor * scale if ".lora_B." in name else tensor).contiguous()
        for name, tensor in weights.state(version).items()
    }
    adapter = weights.peft_config(weights.rank).to_dict()
    header = _header(policy, version, tensors)

    def write(layers: Mapping[str, Tensor], file: str) -> None:
        prefix = "unet" if isinstance(policy, UNetPolicy) else "transformer"
        described = {f"{prefix}.{key}": _plain(value) for key, value in adapter.items()}
        metadata = {**header, "lora_adapter_metadata": json.dumps(described, sort_keys=True)}
        save_file(dict(layers), file, metadata=metadata)

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy, UNetPolicy):
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors, save_function=write)
    else:
        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=tensors, save_function=write
        )
    fresh = _pipeline_from(policy, policy.folder.path)
    fresh.load_lora_weights(str(folder), weight_name=LORA_FILE)
    try:
        report = _compare(policy, version, fresh, folder / LORA_FILE)
    except PolicyError:
        (folder / LORA_FILE).unlink()
        raise
    return {
        "kind": "lora",
        "version": version,
        "file": str(folder / LORA_FILE),
        **report,
        "sha256": fingerprint_state(tensors),
    }


def export_full(policy: UNetPolicy | SD3Policy, version: str, folder: Path) -> dict[str, object]:
    """Write the whole pipeline with a version's denoiser, reload it in plain diffusers and compare.

    Args:
        policy: A policy with full fine-tuning.
        version: Which version.
        folder: Where to; made if absent.
    Returns:
        As `export_lora`; `file` is the folder.
    Raises:
        PolicyError: a LoRA policy, or the reloaded model differs.
    """
    if policy.weights.kind != "full":
        raise PolicyError("export_full: the policy trains adapters (tuning.kind=lora); use export_lora")
    if folder.resolve() == policy.folder.path.resolve():
        raise PolicyError(f"{folder}: is the base model's own folder; export to another one")
    pipeline = _pipeline_from(policy, policy.folder.path)
    with policy.weights.use(version):
        _set_denoiser(pipeline, policy.weights.network)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    settings = policy.folder.path / SETTINGS_FILE
    if settings.is_file():
        shutil.copy(settings, folder / SETTINGS_FILE)
    report = _compare(policy, version, _pipeline_from(policy, folder), folder)
    state = policy.weights.state(version)
    return {
        "kind": "full",
        "version": version,
        "file": str(folder),
        **report,
        "sha256": fingerprint_state(state),
    }


def _header(policy: UNetPolicy | SD3Policy, version: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    is_unet = isinstance(policy, UNetPolicy)
    height, width = policy.latent_shape[1:]
    factor = 2 ** (len(policy.vae.config.block_out_channels) - 1)
    base = policy.folder.path.name
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora" if is_unet else "stable-diffusion-3/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{base} {version}",
        "modelspec.resolution": f"{width * factor}x{height * factor}",
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "modelspec.description": "Preference-aligned LoRA made by diffexpo",
        "modelspec.prediction_type": policy.path.prediction_type,
        "modelspec.hash_sha256": fingerprint_state(tensors),
        "ss_base_model_version": "sd_v1" if is_unet else "sd3",
        "ss_network_module": "peft.lora",
        "ss_network_dim": str(policy.weights.rank),
        # The scale is inside the tensors already.
        "ss_network_alpha": str(policy.weights.rank),
        "ss_training_comment": f"base weights sha256 {policy.fingerprint}",
    }


def _plain(value: object) -> object:
    """JSON form of a peft setting: sets become sorted lists, enumerations their text."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (bool, int, float, list, dict)) or value is None:
        return value
    return str(value.value if isinstance(value, Enum) else value)


def _pipeline_from(policy: UNetPolicy | SD3Policy, folder: Path) -> Pipeline:
    """A fresh plain-diffusers pipeline of the folder, as any user would load it."""
    try:
        if isinstance(policy, UNetPolicy):
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(folder),
                dtype=policy.dtype,
                variant=policy.folder.variant if folder == policy.folder.path else None,
                safety_checker=None,
                requires_safety_checker=False,
                local_files_only=True,
            )
        else:
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                str(folder),
                dtype=policy.dtype,
                variant=policy.folder.variant if folder == policy.folder.path else None,
                text_encoder_3=None,
                tokenizer_3=None,
                local_files_only=True,
            )
    except LOAD_ERRORS as error:
        raise PolicyError(
            f"{folder}: plain diffusers cannot load it for the export check ({error})"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(policy.device)


def _denoiser(pipeline: Pipeline) -> nn.Module:
    return pipeline.unet if isinstance(pipeline, StableDiffusionPipeline) else pipeline.transformer


def _set_denoiser(pipeline: Pipeline, network: nn.Module) -> None:
    if isinstance(pipeline, StableDiffusionPipeline):
        pipeline.unet = network
    else:
        pipeline.transformer = network


def _compare(policy: UNetPolicy | SD3Policy, version: str, fresh: Pipeline, where: Path) -> dict[str, object]:
    """One forward and one two-step picture: ours with the version against the reloaded pipeline.

    Raises:
        PolicyError: they differ by more than the tolerance; the file must not be trusted.
    """
    x_t = torch.randn(1, *policy.latent_shape, generator=torch_generator("export", "latents"))
    x_t = x_t.to(policy.device, policy.dtype)
    t = torch.tensor([0.5])
    conditioning = policy.encode_prompts([PROBE_PROMPT])
    ours = _pipeline_from(policy, policy.folder.path)
    with torch.no_grad(), policy.weights.use(version):
        forward_ours = policy.predict(x_t, t, conditioning)
        _set_denoiser(ours, policy.weights.network)
        image_ours = _draw(ours, policy, x_t)
    with torch.no_grad():
        forward_fresh = _forward(fresh, policy, x_t, t)
        image_fresh = _draw(fresh, policy, x_t)
    if policy.weights.kind == "full":
        _refuse_other_weights(policy, version, _denoiser(fresh), where)
    largest = max(1.0, float(forward_ours.abs().max()))
    forward_difference = float((forward_ours - forward_fresh).abs().max()) / largest
    image_difference = float((image_ours - image_fresh).abs().max())
    is_exact_scale = (
        policy.weights.kind == "full" or math.frexp(policy.weights.alpha / policy.weights.rank)[0] == 0.5
    )
    allowed = TOLERANCE if policy.dtype == torch.float32 else 1e-2
    allowed = allowed if is_exact_scale else 10 * allowed
    # Written so that a NaN difference fails too.
    if not (forward_difference <= allowed and image_difference <= allowed):
        raise PolicyError(
            f"{where}: plain diffusers gives another result after reloading (forward "
            f"{forward_difference:.3g}, image {image_difference:.3g}, allowed {allowed:.1g}); do not use the "
            "file, check the diffusers and peft versions"
        )
    return {
        "forward_difference": forward_difference,
        "image_difference": image_difference,
        "base_fingerprint": policy.fingerprint,
    }


def _refuse_other_weights(policy: UNetPolicy | SD3Policy, version: str, network: nn.Module, where: Path) -> None:
    """Raise PolicyError unless the reloaded network holds the version's tensors bit for bit."""
    saved = network.state_dict()
    for name, value in policy.weights.state(version).items():
        if not torch.equal(saved[name].cpu(), value.to(saved[name].dtype)):
            raise PolicyError(f"{where}: {name} differs after reloading; do not use the file, check the disk")


def _forward(pipeline: Pipeline, policy: UNetPolicy | SD3Policy, x_t: Tensor, t: Tensor) -> Tensor:
    """The pipeline's own text path and network call for one latent."""
    timestep = policy.path.timestep(t).to(policy.device)
    device = policy.device
    if isinstance(pipeline, StableDiffusionPipeline):
        states, _ = pipeline.encode_prompt(PROBE_PROMPT, device, 1, False)
        return pipeline.unet(x_t, timestep, encoder_hidden_states=states, return_dict=False)[0]
    states, _, pooled, _ = pipeline.encode_prompt(
        PROBE_PROMPT,
        None,
        None,
        device=device,
        do_classifier_free_guidance=False,
        max_sequence_length=policy.t5_tokens,
    )
    return pipeline.transformer(
        hidden_states=x_t,
        timestep=timestep,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def _draw(pipeline: Pipeline, policy: UNetPolicy | SD3Policy, x_t: Tensor) -> Tensor:
    """A two-step picture (H, W, 3) in [0, 1] from given noise, with guidance."""
    factor = pipeline.vae_scale_factor
    height, width = (size * factor for size in policy.latent_shape[1:])
    generator = torch.Generator("cpu").manual_seed(0)
    if isinstance(pipeline, StableDiffusionPipeline):
        result = pipeline(
            PROBE_PROMPT,
            height,
            width,
            2,
            guidance_scale=3.0,
            latents=x_t,
            generator=generator,
            output_type="pt",
        )
    else:
        result = pipeline(
            PROBE_PROMPT,
            height=height,
            width=width,
            num_inference_steps=2,
            guidance_scale=3.0,
            latents=x_t,
            generator=generator,
            max_sequence_length=policy.t5_tokens,
            output_type="pt",
        )
    return result.images[0].float()
