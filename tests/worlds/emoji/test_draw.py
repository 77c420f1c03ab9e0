"""The shipped bases load in plain diffusers and draw from keyed noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from diffexpo.worlds import emoji
from worlds.emoji.draw import draw_images, load_pipeline


@pytest.mark.parametrize(
    ("name", "kind"), [("diffusion", StableDiffusionPipeline), ("flow", StableDiffusion3Pipeline)]
)
def test_bases_are_plain_diffusers_folders_in_float32(name: str, kind: type) -> None:
    pipeline = load_pipeline(emoji.asset_path(name))
    assert type(pipeline) is kind
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    texts = ["noto red heart"]
    alone = draw_images(pipeline, texts, ["a"], steps=2)
    beside = draw_images(pipeline, [*texts, "twemoji dog"], ["a", "b"], steps=2)
    assert alone.shape == (1, 64, 64, 3)
    assert (
        np.abs(alone[0].astype(int) - beside[0].astype(int)).max() <= 2
    )  # its noise does not depend on the batch
