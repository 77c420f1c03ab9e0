"""The improvement model over its guidance scales: the same images, improved at each, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexpo.assembly.actions import open_run
from diffexpo.assembly.aliases import resolve
from diffexpo.assembly.evaluating import finite_mean
from diffexpo.assembly.improving import restore_improver
from diffexpo.assembly.self_judges import open_denoiser
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.rows import Preference, Sample
from diffexpo.data.store import Store
from diffexpo.diffusion.guidance import DoubleGuidance
from diffexpo.evaluation.grid import image_grid, save_grid
from diffexpo.files import write_json
from diffexpo.online.improved_pairs import relative_distance
from diffexpo.online.stages.improve import improve_latents, improver_sampler
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.scoring import score_drawn
from diffexpo.types import Drawn, Policy, Scorer

SWEEP_PICTURE, SWEEP_NUMBERS = "improver_sweep.png", "improver_sweep.json"


def sweep(
    run_dir: Path, *, text_scales: Sequence[float], image_scales: Sequence[float], num_prompts: int
) -> dict[str, object]:
    """Improve a few images at every pair of guidance scales, from the same noise: one image, and numbers.

    Args:
        run_dir: A run whose improvement model is trained; see `restore_improver` for what is refused.
        text_scales, image_scales: s_T and s_I.
        num_prompts: Rows of the image: one image each of the newest collected prompts, before that losers
            of the offline pairs.
    Returns:
        Where image and numbers lie, and a line for each pair of scales.
    """
    config, store, policy = open_run(run_dir)
    improver = restore_improver(config, run_dir, store, policy)
    losers = losers_to_show(store, num_prompts)
    texts = [loser.prompt for loser in losers]
    latents = torch.from_numpy(store.latents([loser.sample_id for loser in losers]))
    cards, judging = [*config.rewards, *config.evaluation.judges], partial(open_denoiser, config, policy)
    scorers = load_rewards(cards, resolve, policy.device, judging)
    embeddings = PromptEmbeddings(policy, ["", *texts])
    keys = [(config.seed, "sweep", loser.sample_id) for loser in losers]
    shown, before = _look(policy, scorers, latents, texts)
    columns, labels, lines = [shown], ["loser"], []
    numbers: list[dict[str, Any]] = []
    for text_scale, image_scale in product(text_scales, image_scales):
        scales, sampler = DoubleGuidance(image_scale, text_scale), improver_sampler(config)
        drawn = improve_latents(improver, embeddings, sampler, scales, keys, texts, latents, lambda: None)
        improved = drawn.cpu()
        shown, after = _look(policy, scorers, improved, texts)
        columns.append(shown)
        labels.append(f"text {text_scale:g}, image {image_scale:g}")
        distance, relative = relative_distance(improved, latents, texts)
        gains = {name: finite_mean(after[name] - before[name]) for name in after}
        cell = {"text_scale": text_scale, "image_scale": image_scale, "latent_distance": distance}
        numbers.append(cell | {"relative_distance": relative, "gain": gains})
        told = "".join(f", {name} {gain:+.3f}" for name, gain in gains.items())
        lines.append(f"{labels[-1]}: relative distance {relative:.2f}{told}")
    rows = list(zip(*columns, strict=True))
    picture, table = run_dir / "eval" / SWEEP_PICTURE, run_dir / "eval" / SWEEP_NUMBERS
    save_grid(picture, image_grid(rows, texts, labels))
    write_json(table, {"prompts": texts, "cells": numbers})
    return {"picture": str(picture), "numbers": str(table), "scales": lines}


def losers_to_show(store: Store, count: int) -> list[Sample]:
    """An image of each of `count` prompts of the newest collection; before that, losers of offline pairs."""
    collected = [iteration for stage, iteration in store.completed() if stage == "collect"]
    if collected:
        first = {sample.prompt: sample for sample in reversed(store.collected(collected[-1]))}
        return list(reversed(first.values()))[:count]
    losers: dict[str, str] = {}
    for pairs in store.parts("pairs", Preference, "offline"):
        for pair in pairs:
            losers.setdefault(pair.prompt, pair.loser_id)
        if len(losers) >= count:
            break
    return store.samples_of(list(losers.values())[:count])


def _look(
    policy: Policy, scorers: Sequence[Scorer], latents: Tensor, texts: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images (N,H,W,3) uint8 and scores of latents."""
    images = policy.decode_latents(latents)
    return to_bytes(images), score_drawn(scorers, Drawn(latents, images), texts)
