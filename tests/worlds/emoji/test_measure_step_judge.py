"""The shipped step judge knows what noisy latents show."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from diffusers import AutoencoderKL

from diffexpo.rng import torch_generator
from diffexpo.worlds import emoji
from worlds.emoji.measure_step_judge import SAMPLER, load_step_judge, split_rows
from worlds.emoji.quality import retrieval
from worlds.emoji.train_step_judge import (
    Latents,
    noise_paths,
    train_rows,
)


def test_the_shipped_judge_knows_what_noisy_latents_show() -> None:
    judge = load_step_judge()
    vae = AutoencoderKL.from_pretrained(emoji.asset_path("diffusion") / "vae", local_files_only=True)
    bounds = {"seen": (0.75, 0.40), "held-out combination": (0.75, 0.25)}
    for kind, rows in split_rows(120).items():
        if kind not in bounds:
            continue
        latents = Latents.of(vae, emoji.load_images([row["id"] for row in rows])).means
        texts = judge.embed_prompts([f"{row['style']} {row['caption']}" for row in rows])
        noise = torch.stack([torch.randn(8, 8, 8, generator=torch_generator("t", row["id"])) for row in rows])
        for path in noise_paths().values():
            found = []
            for t in (0.1, 0.5, 0.9):
                alpha, sigma = path.alpha_sigma(torch.full((len(rows),), t))
                x_t = alpha.view(-1, 1, 1, 1) * latents + sigma.view(-1, 1, 1, 1) * noise
                found.append(retrieval(judge.embed_states(x_t, alpha, sigma)[0] @ texts.T)[0])
            assert found[0] >= bounds[kind][0] and found[1] >= bounds[kind][1] and found[0] > found[2]


def test_its_score_depends_on_the_level_and_falls_in_scale_with_noise() -> None:
    judge = load_step_judge()
    x = torch.randn(8, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        judge.score(x, math.sqrt(1 - sigma**2), sigma, ["noto red heart"] * 8) for sigma in (0.1, 0.6, 0.99)
    ]
    assert all(float((one - other).abs().max()) > 1e-2 for one, other in pairwise(scores))
    _, scale = judge.embed_states(x[:2], torch.tensor([0.99, 0.05]), torch.tensor([0.14, 0.99]))
    assert float(scale[0]) > float(scale[1])  # what noise hides is told with less confidence


def test_the_measured_branches_are_those_of_the_recipe() -> None:
    from diffexpo.config import load_config

    config = load_config(["emoji/spo"], [], {}).config
    assert config.explore.sampler.model_dump() == SAMPLER.model_dump()


def test_nothing_held_out_was_trained_on() -> None:
    seen, kinds = train_rows(), split_rows(10**6)
    assert {row["id"] for row in seen} == {row["id"] for row in kinds["seen"]}
    assert {row["concept"] for row in seen}.isdisjoint(row["concept"] for row in kinds["held-out concept"])
    texts = {f"{row['style']} {row['caption']}" for row in seen}
    assert texts.isdisjoint(f"{row['style']} {row['caption']}" for row in kinds["held-out combination"])
    assert len(texts) > 6000 and sum(map(len, kinds.values())) == len(emoji.load_rows())
