"""Writes the models as folders that plain diffusers and transformers load: float16 weights, float32 when
loaded."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffexpo.rewards.step_judge import CONFIG, WEIGHTS, StepJudgeNetwork, StepJudgeShape, shape_as_json
from worlds.emoji.fit import save_tensors
from worlds.emoji.models import IMAGE_SIZE, make_ddim, make_flow_scheduler

_PREPROCESSOR = {
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": IMAGE_SIZE},
}


Module = TypeVar("Module", bound=nn.Module)


def half_copy(module: Module) -> Module:
    """Return a float16 copy on the CPU; the module itself stays as it is."""
    return copy.deepcopy(module).cpu().eval().to(torch.float16)


def _clean_configs(folder: Path) -> None:
    """State float32, which transformers else would load as the stored float16, and forget where a part came
    from."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(config).replace('"dtype": "float16"', '"dtype": "float32"')
        config = {key: value for key, value in json.loads(text).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_folder(temporary: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def _fresh(out: Path) -> Path:
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return temporary


def save_judge(judge: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Write a judge in PickScore's layout: CLIPModel, CLIPTokenizer, preprocessor_config.json."""
    temporary = _fresh(out)
    half_copy(judge).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "preprocessor_config.json").write_text(
        json.dumps(_PREPROCESSOR, indent=2) + "\n", encoding="utf-8"
    )
    _clean_configs(temporary)
    _replace_folder(temporary, out)


def save_step_judge(network: StepJudgeNetwork, shape: StepJudgeShape, out: Path) -> None:
    """Write a step judge: config.json and the network; the text tower stays where config.json says it is."""
    temporary = _fresh(out)
    save_tensors(half_copy(network).state_dict(), temporary / WEIGHTS)
    (temporary / CONFIG).write_text(shape_as_json(shape), encoding="utf-8")
    _replace_folder(temporary, out)


def save_diffusion(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    out: Path,
    scheduler: DDIMScheduler | None = None,
) -> None:
    """Write the diffusion base as a StableDiffusionPipeline folder; `make_ddim` is the default schedule."""
    temporary = _fresh(out)
    StableDiffusionPipeline(
        vae=half_copy(vae),
        text_encoder=half_copy(text_encoder),
        tokenizer=tokenizer,
        unet=half_copy(unet),
        scheduler=scheduler or make_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(temporary)
    _clean_configs(temporary)
    _replace_folder(temporary, out)


def save_flow(
    vae: AutoencoderKL,
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    transformer: SD3Transformer2DModel,
    out: Path,
) -> None:
    """Write the flow base as a StableDiffusion3Pipeline folder without a T5 encoder."""
    temporary = _fresh(out)
    StableDiffusion3Pipeline(
        vae=half_copy(vae),
        text_encoder=half_copy(text_encoders[0]),
        text_encoder_2=half_copy(text_encoders[1]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=half_copy(transformer),
        scheduler=make_flow_scheduler(),
    ).save_pretrained(temporary)
    _clean_configs(temporary)
    _replace_folder(temporary, out)
