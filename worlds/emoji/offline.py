"""Makes the offline preference set: pairs of generated images, labelled by the training judge with
noise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

from diffexpo.worlds.emoji import asset_path, keyed_fraction, train_prompts
from worlds.emoji.draw import draw_images, load_pipeline, to_float
from worlds.emoji.train_judge import embed_images, embed_texts
from worlds.preferences import (
    JPEG_QUALITY,
    LabelNoise,
    Planned,
    draw_planned,
    from_jpeg,
    label_pairs,
    plan_images,
    to_jpeg,
    write_pairs,
)

STEPS = (8, 12, 20)
GUIDANCES = (1.5, 3.0, 6.0)
NOISE = LabelNoise(flips=0.175, ties=0.03)


@torch.no_grad()
def _judge_scores(folder: Path, images: np.ndarray, captions: list[str]) -> np.ndarray:
    judge = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    scale = judge.logit_scale.exp()
    parts = []
    for start in range(0, len(images), 128):
        seen = embed_images(judge, to_float(images[start : start + 128]))
        parts.append(scale * (seen * embed_texts(judge, tokenizer, captions[start : start + 128])).sum(-1))
    return torch.cat(parts).double().numpy()


def _drawer(sources: Mapping[str, Path]) -> Callable[[Sequence[Planned]], np.ndarray]:
    """What draws planned images of one source and setting; a base is loaded once."""
    load = functools.cache(lambda source: load_pipeline(sources[source]))

    def draw(items: Sequence[Planned]) -> np.ndarray:
        captions, keys = [item.caption for item in items], [item.key for item in items]
        steps, guidance = items[0].steps, items[0].guidance
        return draw_images(load(items[0].source), captions, keys, steps=steps, guidance=guidance)

    return draw


def make_offline(
    out: Path,
    seed: int,
    *,
    num_prompts: int = 340,
    sources: Mapping[str, Path] | None = None,
    shares: Mapping[str, float] | None = None,
    judge: Path | None = None,
) -> int:
    """Write preference pairs of train prompts in the columns of Pick-a-Pic v2.

    Each prompt gets three images, whose source, number of steps and guidance scale are drawn by keyed hash;
    every two of them are a pair, labelled by the training judge with `NOISE` (`worlds.preferences`).

    Args:
        out: the parquet file.
        seed: names the choice of prompts and the noise of the labels.
        num_prompts: number of prompts, three pairs each.
        sources: folder of each named source; by default the two shipped bases.
        shares: how often each source draws, summing to 1; by default equal.
        judge: folder of the labelling judge; by default the shipped training judge.

    Returns:
        The number of pairs. The file's schema metadata holds temperature, flip and tie counts and sources as
        JSON.
    """
    sources = sources or {"emoji-diffusion": asset_path("diffusion"), "emoji-flow": asset_path("flow")}
    shares = shares or {name: 1 / len(sources) for name in sources}
    prompts = sorted(train_prompts(), key=lambda prompt: keyed_fraction("offline prompt", seed, prompt.id))
    plan = plan_images(prompts[:num_prompts], shares, STEPS, GUIDANCES)
    files = [to_jpeg(image) for image in draw_planned(plan, _drawer(sources))]
    stored = np.stack([from_jpeg(data) for data in files])
    scores = _judge_scores(judge or asset_path("judge_train"), stored, [item.caption for item in plan])
    rows, labelling = label_pairs(plan, files, scores, seed, NOISE)
    facts = {
        "judge": "judge_train",
        **labelling,
        "pairs": len(rows),
        "seed": seed,
        "sources": dict(shares),
        "jpeg_quality": JPEG_QUALITY,
    }
    write_pairs(rows, facts, out)
    print(f"offline: {facts}", flush=True)
    return len(rows)
