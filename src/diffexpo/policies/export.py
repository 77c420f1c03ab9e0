"""Hand a trained version to plain diffusers, and refuse to say "saved" before plain diffusers has drawn the
same image.

A LoRA file is `B' A` with the scale alpha / rank folded into B' (so that loaders which ignore metadata
agree), with the adapter's configuration and the usual `modelspec.*` and `ss_*` keys in the header:

    pytorch_lora_weights.safetensors   `unet.*` or `transformer.*` keys, for `load_lora_weights` and, for
                                       transformers, ComfyUI
    kohya_lora.safetensors             UNets: `lora_unet_*` keys with lora_down, lora_up and alpha, for
                                       ComfyUI and kohya's tools
    adapter_model.safetensors, adapter_config.json
                                       families whose pipeline loads no LoRA (PixArt): for `peft.PeftModel`

What a pipeline's call needs beyond prompt, size, steps, guidance and generator stands on the family's card.
"""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import save
from torch import Tensor

from diffexpo.errors import PolicyError
from diffexpo.files import readable, write_bytes
from diffexpo.phases import phase
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.copying import copy_untrained
from diffexpo.policies.family import FamilyPolicy, class_of
from diffexpo.policies.loading import LOAD_ERRORS
from diffexpo.policies.weights import LoraWeightSets, fingerprint_state

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Largest difference of outputs allowed, relative to the largest value: matrix kernels of some CPUs round by
# where a tensor lies in memory. Folding a scale that is not a power of two rounds once more. Trained weights
# must be equal.
TOLERANCE = 1e-5
PROBE_PROMPT = "a photo"
STEPS, GUIDANCE = 2, 3.0
Exported = tuple[list[Path], dict[str, object], Mapping[str, Tensor]]
"""Files, differences and the tensors that were written."""
_log = logging.getLogger("diffexpo")


@phase("exporting")
def export_policy(
    policy: FamilyPolicy, version: str, folder: Path, title: str | None = None, *, whole: bool = False
) -> dict[str, object]:
    """Export a version as its tuning kind says: LoRA files, or a whole pipeline, in a folder that need not
    exist. `title` is what headers call it, by default the base model's folder and the version; `whole` makes
    a pipeline of LoRA too, with W + alpha / rank B A in place of each adapted W.

    Returns:
        kind, version, `file` (of a whole pipeline the folder) and `files`, sha256 of the tensors, base
        fingerprint, and the largest relative differences `forward_difference` and `image_difference` between
        the policy and a fresh plain-diffusers pipeline (0 when alpha / rank is a power of two).
    Raises:
        PolicyError: the reloaded model differs, and then no LoRA file stays; the base model's own folder.
    """
    weights = policy.weights
    if isinstance(weights, LoraWeightSets) and not whole:
        kind, export = "lora", _LoraExport(policy, weights, version, folder, title).run()
    else:
        kind, export = "full", _export_full(policy, version, folder)
    files, report, tensors = export
    return {
        "kind": kind,
        "version": version,
        "file": str(files[0]),
        "files": [str(file) for file in files],
        **report,
        "sha256": fingerprint_state(tensors),
    }


def _export_full(policy: FamilyPolicy, version: str, folder: Path) -> Exported:
    """Write the whole pipeline with a version's denoiser, reload it in plain diffusers and compare."""
    if folder.resolve() == policy.folder.path.resolve():
        raise PolicyError(f"{folder}: is the base model's own folder; export to another one")
    pipeline = _pipeline_from(policy, policy.folder.path)
    copy_untrained(policy.folder, folder, policy.card.denoiser[0], left_out(policy))
    denoiser, network = getattr(pipeline, policy.card.denoiser[0]), policy.weights.network
    with policy.weights.use(version, merged=True):
        state = network.state_dict().items()
        # Adapters wrap a module; folded, their update is in its own weight.
        plain = {name.replace(".base_layer.", "."): value for name, value in state if ".lora_" not in name}
        denoiser.load_state_dict(plain)
    denoiser.save_pretrained(str(folder / policy.card.denoiser[0]))
    readable(folder)
    report = _compare(policy, version, _pipeline_from(policy, folder), folder, pipeline)
    return [folder], report, policy.weights.state(version)


def attach_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Load an exported LoRA into a plain pipeline: by the pipeline's own loader, or by peft where it has
    none."""
    if (folder / PEFT_FILE).is_file() and not (folder / LORA_FILE).is_file():
        wrapped = PeftModel.from_pretrained(pipeline.transformer, str(folder))
        pipeline.transformer = wrapped.get_base_model().eval()
    else:
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)


def call_arguments(policy: FamilyPolicy) -> dict[str, object]:
    """What the pipeline's call needs besides prompt, size, steps, guidance and generator."""
    card = policy.card
    length = {"max_sequence_length": policy.sequence_length} if card.text_tokens else {}
    return {**length, **card.call, **(_image_size(policy) if card.call_needs_size else {})}


def kohya_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA factors under the names of kohya's tools and ComfyUI.

    `down_blocks.0.to_q.lora_A.weight` -> `lora_unet_down_blocks_0_to_q.lora_down.weight`, and one `.alpha` a
    module, equal to the rank because the scale is in the factors.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, factor = name.partition(".lora_")
        module = "lora_unet_" + path.replace(".", "_")
        if factor == "A.weight":
            renamed[f"{module}.lora_down.weight"] = tensor
            renamed[f"{module}.alpha"] = torch.tensor(float(len(tensor)))
        else:
            renamed[f"{module}.lora_up.weight"] = tensor
    return renamed


# ---- writing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoraExport:
    """The LoRA files of one version."""

    policy: FamilyPolicy
    weights: LoraWeightSets
    version: str
    folder: Path
    title: str | None = None

    def run(self) -> Exported:
        """Write the files of the family and compare a fresh plain-diffusers pipeline that loads each."""
        policy, version = self.policy, self.version
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.write()
        fresh = _pipeline_from(policy, policy.folder.path)
        attach_lora(fresh, self.folder)
        try:
            report = _compare(policy, version, fresh, file, copy.copy(fresh))
        except PolicyError:
            file.unlink()
            raise
        kohya = self.write_kohya(fresh) if policy.card.has_kohya_file else []
        return [file, *kohya], report, self.tensors

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The factors with the scale folded into B."""
        scale = self.weights.alpha / self.weights.rank
        return {
            name: (tensor * scale if ".lora_B." in name else tensor).contiguous()
            for name, tensor in self.weights.state(self.version).items()
        }

    @cached_property
    def header(self) -> dict[str, str]:
        size, card = _image_size(self.policy), self.policy.card
        text_width = self.weights.network.config.get("cross_attention_dim")
        architecture, base_version = card.export_names_by_text_width.get(text_width, card.export_names)
        return {
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": self.title or f"{self.policy.folder.path.name} {self.version}",
            "modelspec.resolution": f"{size['width']}x{size['height']}",
            "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "modelspec.description": "Preference-aligned LoRA made by diffexpo",
            "modelspec.prediction_type": self.policy.path.prediction_type,
            "modelspec.hash_sha256": fingerprint_state(self.tensors),
            "ss_base_model_version": base_version,
            "ss_network_module": "peft.lora",
            "ss_network_dim": str(self.weights.rank),
            # The scale is inside the tensors already.
            "ss_network_alpha": str(self.weights.rank),
            "ss_training_comment": f"base weights sha256 {self.policy.fingerprint}",
        }

    def write(self) -> Path:
        """With the names and the settings that the pipeline's own loader reads, or else in peft's layout."""
        # The scale is in the tensors already; what peft holds as sets is written as sorted lists.
        settings = self.weights.peft_config(self.weights.rank).to_dict()
        if hasattr(class_of(self.policy.folder.pipeline_class), "load_lora_weights"):
            prefix, file = self.policy.card.denoiser[0], self.folder / LORA_FILE
            named = {f"{prefix}.{key}": value for key, value in settings.items()}
            adapter = json.dumps(named, sort_keys=True, default=sorted)
            metadata = {**self.header, "lora_adapter_metadata": adapter}
        else:
            prefix, file, metadata = "base_model.model", self.folder / PEFT_FILE, self.header
            settings |= {"inference_mode": True}
            adapter = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
            (self.folder / PEFT_CONFIG).write_text(adapter, encoding="utf-8")
        tensors = {f"{prefix}.{name}": value for name, value in self.tensors.items()}
        write_bytes(file, save(tensors, metadata=metadata))
        return file

    def write_kohya(self, fresh: DiffusionPipeline) -> list[Path]:
        """The file for ComfyUI, if diffusers reads it as the same model; else no file and a warning."""
        file = self.folder / KOHYA_FILE
        metadata = {**self.header, "ss_network_module": "networks.lora"}
        write_bytes(file, save(kohya_tensors(self.tensors), metadata=metadata))
        try:
            fresh.unload_lora_weights()
            fresh.load_lora_weights(str(self.folder), weight_name=KOHYA_FILE)
            _compare(self.policy, self.version, fresh, file, copy.copy(fresh))
        except (*LOAD_ERRORS, PolicyError) as error:
            file.unlink()
            why = "diffusers does not read it as the same model"
            _log.warning("%s is not written: %s (%s); take %s", file, why, error, LORA_FILE)
            return []
        return [file]


def _image_size(policy: FamilyPolicy) -> dict[str, int]:
    """Height and width in pixels, as a pipeline's call takes them."""
    factor = vae_factor(policy.vae)
    return {"height": policy.latent_shape[1] * factor, "width": policy.latent_shape[2] * factor}


# ---- reloading ---------------------------------------------------------------------------------------------


def left_out(policy: FamilyPolicy) -> tuple[str, ...]:
    """Components that the pipeline is loaded without: those the folder does not have, checkers of its
    images, and T5 where the policy runs without it."""
    index, card = policy.folder.index, policy.card
    absent = [name for name, entry in index.items() if entry == [None, None]]
    texts = card.optional if len(policy.text_encoders) < len(card.text_encoders) else ()
    checkers = [name for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index]
    return tuple(dict.fromkeys([*absent, *texts, *checkers]))


def _pipeline_from(policy: FamilyPolicy, folder: Path) -> DiffusionPipeline:
    """A fresh plain-diffusers pipeline of the folder, as any user would load it."""
    settings: dict[str, Any] = dict.fromkeys(left_out(policy))
    own = {"text_encoder": policy.text_encoder.dtype, "vae": policy.vae.dtype} if policy.keeps_dtypes else {}
    if "safety_checker" in settings:
        settings["requires_safety_checker"] = False
    try:
        pipeline = class_of(policy.folder.pipeline_class).from_pretrained(
            str(folder),
            dtype={"default": policy.dtype, **own},
            variant=policy.folder.variant if folder == policy.folder.path else None,
            local_files_only=True,
            **settings,
        )
    except LOAD_ERRORS as error:
        why = f"plain diffusers cannot load it for the export check ({error})"
        raise PolicyError(f"{folder}: {why}") from error
    pipeline.set_progress_bar_config(disable=True)
    names = (name.replace("text_encoder", "tokenizer") for name in policy.card.text_encoders)
    present = (getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None)
    for tokenizer, own in zip(present, policy.tokenizers, strict=True):
        tokenizer.model_max_length = own.model_max_length  # that of the file may be without limit
    return pipeline.to(policy.device)


def _compare(
    policy: FamilyPolicy, version: str, fresh: DiffusionPipeline, where: Path, ours: DiffusionPipeline
) -> dict[str, object]:
    """Compare the first network call and the image of two steps of the reloaded pipeline, and of `ours` with
    the version, which has the base model's other components.

    Raises:
        PolicyError: they differ by more than the tolerance, or whole weights by a bit; the file must not be
            trusted.
    """
    name = policy.card.denoiser[0]
    with torch.no_grad(), policy.weights.use(version):
        setattr(ours, name, policy.weights.network)
        forward_ours, image_ours = _draw(ours, policy)
    with torch.no_grad():
        forward_fresh, image_fresh = _draw(fresh, policy)
    if policy.weights.kind == "full":
        saved = getattr(fresh, name).state_dict()
        for key, value in policy.weights.state(version).items():
            if not torch.equal(saved[key].cpu(), value.to(saved[key].dtype)):
                raise PolicyError(
                    f"{where}: {key} differs after reloading; do not use the file, check the disk"
                )
    largest = max(1.0, float(forward_ours.abs().max()))
    forward_difference = float((forward_ours - forward_fresh).abs().max()) / largest
    image_difference = float((image_ours - image_fresh).abs().max())
    allowed, weights = TOLERANCE if policy.dtype == torch.float32 else 1e-2, policy.weights
    if isinstance(weights, LoraWeightSets) and math.frexp(weights.alpha / weights.rank)[0] != 0.5:
        allowed *= 10
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


def _draw(pipeline: DiffusionPipeline, policy: FamilyPolicy) -> tuple[Tensor, Tensor]:
    """The denoiser's first output, and a two-step image (3, H, W) in [0, 1], with guidance, from noise of a
    fixed seed."""
    outputs: list[Tensor] = []
    hook = getattr(pipeline, policy.card.denoiser[0]).register_forward_hook(
        lambda module, inputs, output: outputs.append(output[0].detach().float().cpu())
    )
    try:
        images = pipeline(
            PROBE_PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="pt",
            **{**_image_size(policy), **call_arguments(policy)},
        ).images
    finally:
        hook.remove()
    return outputs[0], images[0].float().cpu()
