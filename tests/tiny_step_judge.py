"""A tiny step judge with keyed random weights, on the tiny CLIP judge's captions."""

from __future__ import annotations

from pathlib import Path

import torch

from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.step_judge import StepJudgeNetwork, StepJudgeShape, text_sample
from tests.tiny import WIDTH, tiny_judge
from worlds.emoji.layout import save_step_judge


def tiny_shape(
    sample: tuple[float, ...], *, paths: tuple[str, ...] = ("vp", "flow"), channels: int = 4
) -> StepJudgeShape:
    return StepJudgeShape(
        latent_shape=(channels, 8, 8),
        paths=paths,
        text="text",
        text_sample=sample,
        embedding=WIDTH,
        patch=2,
        width=8,
        hidden=16,
        blocks=2,
    )


def tiny_step_judge(folder: Path, *, paths: tuple[str, ...] = ("vp", "flow"), channels: int = 4) -> Path:
    """A step judge folder with its text tower inside it; every weight counts, those that begin at 0 too."""
    clip = ClipReward("text", str(tiny_judge(folder.parent / f"{folder.name}-text")))
    shape = tiny_shape(text_sample(clip), paths=paths, channels=channels)
    network = StepJudgeNetwork(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    save_step_judge(network, shape, folder)
    (folder.parent / f"{folder.name}-text").rename(folder / "text")
    return folder
