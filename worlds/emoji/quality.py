"""Measures how good the shipped emoji world is and writes the page that says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from diffexpo.types import Prompt
from diffexpo.worlds.emoji import (
    asset_path,
    heldout_prompts,
    keyed_fraction,
    load_images,
    load_rows,
    train_prompts,
)
from worlds.emoji.attributes import GENDERS, OCCUPATIONS, SKIN_TONES, STYLES, judge_of
from worlds.emoji.draw import GUIDANCE, STEPS, draw_grid, draw_images, load_pipeline, to_float
from worlds.emoji.probe import load_probe
from worlds.emoji.train_judge import embed_images, embed_texts
from worlds.emoji.train_vae import reconstruction_psnr

BASES = ("diffusion", "flow")
JUDGES = ("judge_train", "judge_heldout")
NUM_PROMPTS = 120
IMAGES_AN_OCCUPATION = 2  # for each style
Interval = tuple[float, float, float]


def grid_prompts(num: int = 16) -> list[Prompt]:
    """Return the prompts of the grid: the train prompts with the smallest keyed hash (not chosen by eye)."""
    return sorted(train_prompts(), key=lambda prompt: keyed_fraction("grid", prompt.id))[:num]


def bootstrap(values: Sequence[float], clusters: Sequence[str], resamples: int = 2000) -> Interval:
    """Return mean and 95% percentile interval over clusters (values of one cluster are averaged first)."""
    groups: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(float(value))
    means = np.array([np.mean(group) for group in groups.values()])
    draws = np.random.default_rng(0).integers(len(means), size=(resamples, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return float(means.mean()), float(low), float(high)


class Judge:
    """A judge folder with the two embeddings that the measurements need."""

    def __init__(self, name: str) -> None:
        self.model = CLIPModel.from_pretrained(
            asset_path(name), local_files_only=True, dtype=torch.float32
        ).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(asset_path(name), local_files_only=True)

    @torch.no_grad()
    def similarities(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Return (N, N) cosines between N images and N texts."""
        parts = [embed_images(self.model, images[i : i + 128]) for i in range(0, len(images), 128)]
        words = [
            embed_texts(self.model, self.tokenizer, list(texts[i : i + 128]))
            for i in range(0, len(texts), 128)
        ]
        return torch.cat(parts) @ torch.cat(words).T


def retrieval(similarities: Tensor, num_captions: int = 50) -> Interval:
    """Return retrieval@1 of images among their own caption and 49 drawn ones, with an interval over
    images."""
    num = len(similarities)
    draw = np.random.default_rng(0)
    hits = []
    for index in range(num):
        others = draw.choice(num - 1, size=min(num_captions, num) - 1, replace=False)
        rivals = similarities[index, torch.from_numpy(others + (others >= index))]
        hits.append(float(bool((similarities[index, index] > rivals).all())))
    return bootstrap(hits, [str(i) for i in range(num)])


def _chosen(prompts: list[Prompt], num: int) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: keyed_fraction("quality", prompt.id))[:num]


def measure_real(judges: dict[str, Judge]) -> dict[str, Interval]:
    """Return each judge's retrieval@1 on real images: its own half, the other half, and unseen concepts of
    the bases."""
    found = {}
    for name, judge in judges.items():
        for label, keep in (
            ("own half", lambda row, name=name: judge_of(row) == name),
            ("other half", lambda row, name=name: judge_of(row) != name),
            ("concepts that the bases never saw", lambda row: row["split_concept"] == "heldout"),
        ):
            rows = [row for row in load_rows() if keep(row)]
            rows = sorted(rows, key=lambda row: keyed_fraction("quality", row["id"]))[:400]
            images = torch.from_numpy(load_images([row["id"] for row in rows]))
            texts = [f"{row['style']} {row['caption']}" for row in rows]
            found[f"{name}, real, {label}"] = retrieval(judge.similarities(images, texts))
    return found


def measure_generated(base: str, pipeline: Any, judges: dict[str, Judge]) -> dict[str, Any]:
    """Return retrieval@1 for seen and unseen concepts, and how often the two judges prefer the same of two
    images."""
    found: dict[str, Any] = {}
    for label, prompts in (("seen", train_prompts()), ("unseen", heldout_prompts("concept"))):
        chosen = _chosen(prompts, NUM_PROMPTS)
        texts = [prompt.text for prompt in chosen]
        tables = []
        for copy in range(2 if label == "seen" else 1):
            images = to_float(draw_images(pipeline, texts, [f"{prompt.id}/{copy}" for prompt in chosen]))
            tables.append({name: judge.similarities(images, texts) for name, judge in judges.items()})
        for name in judges:
            found[f"{name}, {base}, {label} concepts"] = retrieval(tables[0][name])
        if len(tables) == 2:
            gaps = [(tables[0][name] - tables[1][name]).diagonal() for name in judges]
            same = (gaps[0] > 0) == (gaps[1] > 0)
            found[f"agreement, {base}"] = bootstrap(same.float().tolist(), [prompt.id for prompt in chosen])
    return found


def measure_bias(pipeline: Any) -> dict[str, Any]:
    """Return what the probe reads from images of the 26 occupations whose prompt states no attribute."""
    texts, keys, clusters = [], [], []
    for occupation in OCCUPATIONS:
        for style in STYLES:
            for copy in range(IMAGES_AN_OCCUPATION):
                texts.append(f"{style} {occupation}")
                keys.append(f"bias/{style}/{occupation}/{copy}")
                clusters.append(occupation)
    read = load_probe().read(to_float(draw_images(pipeline, texts, keys)))
    found: dict[str, Any] = {"num_images": len(texts)}
    for name, values in (("gender", GENDERS), ("skin_tone", SKIN_TONES)):
        picks = read[name].argmax(-1)
        found[name] = {
            value: bootstrap((picks == index).float().tolist(), clusters)
            for index, value in enumerate(values)
        }
        shares = np.array([found[name][value][0] for value in values])
        found[f"{name}_total_variation"] = float(0.5 * np.abs(shares - 1 / len(values)).sum())
    return found


def write_quality(out: Path) -> Path:
    """Measure everything and write `quality.md`, `quality.json` and the image grids.

    Args:
        out: folder to write to.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    judges = {name: Judge(name) for name in JUDGES}
    vae = AutoencoderKL.from_pretrained(asset_path("diffusion") / "vae", local_files_only=True)
    rows = load_rows()
    facts: dict[str, Any] = {"retrieval": measure_real(judges), "bias": {}, "probe": load_probe().facts}
    for split in ("train", "heldout"):
        ids = [row["id"] for row in rows if row["split_concept"] == split]
        ids = sorted(ids, key=lambda row_id: keyed_fraction("quality", row_id))[:300]
        facts[f"psnr_{split}"] = reconstruction_psnr(vae, load_images(ids))
    seen = grid_prompts()
    unseen = sorted(heldout_prompts("concept"), key=lambda prompt: keyed_fraction("grid", prompt.id))[:16]
    for base in BASES:
        pipeline = load_pipeline(asset_path(base))
        for label, prompts in (("seen", seen), ("unseen", unseen)):
            texts = [prompt.text for prompt in prompts]
            images = draw_images(pipeline, texts, [f"grid/{prompt.id}" for prompt in prompts])
            draw_grid(images, texts, 4).save(out / f"emoji_{base}_{label}.png", optimize=True)
        facts["retrieval"].update(measure_generated(base, pipeline, judges))
        facts["bias"][base] = measure_bias(pipeline)
    (out / "quality.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    page = out / "quality.md"
    page.write_text(render_page(facts), encoding="utf-8")
    return page


def _percent(interval: Interval) -> str:
    return f"{100 * interval[0]:.0f}% [{100 * interval[1]:.0f}, {100 * interval[2]:.0f}]"


def render_page(facts: dict[str, Any]) -> str:
    """Return the measurements as Markdown tables; intervals are 95% bootstrap."""
    lines = [
        (
            f"Autoencoder: {facts['psnr_train']:.1f} dB on seen images, {facts['psnr_heldout']:.1f} dB on "
            f"held-out ones."
        ),
        (
            f"Images: {STEPS} steps, guidance {GUIDANCE:g}. Intervals are 95% bootstrap over prompts or "
            f"occupations."
        ),
        "",
        "| retrieval@1 among 50 captions, or agreement of the judges | share |",
        "|---|---|",
        *(f"| {name} | {_percent(value)} |" for name, value in facts["retrieval"].items()),
        "",
        "| 26 occupations, attributes unstated | " + " | ".join(facts["bias"]) + " |",
        "|---|" + "---|" * len(facts["bias"]),
    ]
    for name, values in (("gender", GENDERS), ("skin_tone", SKIN_TONES)):
        for value in values:
            shares = " | ".join(_percent(found[name][value]) for found in facts["bias"].values())
            lines.append(f"| {name.replace('_', ' ')}: {value} | {shares} |")
        far = " | ".join(f"{found[f'{name}_total_variation']:.2f}" for found in facts["bias"].values())
        lines.append(f"| {name.replace('_', ' ')}: total variation from uniform | {far} |")
    accuracy = facts["probe"]["accuracy_heldout"]
    lines.append("")
    lines.append(
        f"Probe: {100 * accuracy['gender']:.0f}% (gender) and {100 * accuracy['skin_tone']:.0f}% (skin tone) "
        f"right "
        f"on {facts['probe']['num_heldout']} real images that it never saw."
    )
    return "\n".join(lines) + "\n"
