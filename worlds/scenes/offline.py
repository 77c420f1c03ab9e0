"""Makes the offline preference set of the scenes: pairs of images that a base drew with various settings,
labelled by the training checker with noise. A miniature of Pick-a-Pic, of which 12% are ties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffexpo.rewards.scenes import find_sprites, load_checker, scene_score
from diffexpo.worlds import asset_path
from diffexpo.worlds.keyed import keyed_fraction
from diffexpo.worlds.scenes.grammar import parse_scene, prompts_of, scenes_of
from worlds.emoji.draw import draw_images, to_float
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
from worlds.scenes.quality import load_base

STEPS = (6, 10)
GUIDANCES = (1.0, 2.5, 4.0)
NOISE = LabelNoise(flips=0.16, ties=0.12)
SOURCE, JUDGE = "scenes-diffusion", "checker_train"


def score_images(checker: Path, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Scores (N,) of images (N, 64, 64, 3) of uint8 for their prompts: `rewards.scenes.scene_score`."""
    network, _ = load_checker(JUDGE, str(checker))
    findings = [found for part in to_float(images).split(100) for found in find_sprites(network, part)]
    pairs = zip(findings, captions, strict=True)
    return np.array([scene_score(found, parse_scene(caption)) for found, caption in pairs])


def make_offline(
    out: Path, seed: int = 0, *, num_prompts: int = 340, base: Path | None = None, checker: Path | None = None
) -> dict[str, object]:
    """Write preference pairs of the prompts of `scenes:train` in the columns of Pick-a-Pic v2.

    Each prompt gets three images, whose number of steps and guidance are drawn by keyed hash; every two of
    them are a pair, labelled by a checker with `NOISE` (`worlds.preferences`). The checker sees the images as
    they are stored.

    Args:
        out: the parquet file.
        seed: names the choice of prompts, the images and the noise of the labels.
        num_prompts: number of prompts, three pairs each.
        base, checker: folders of the base that draws and of the checker that labels; by default the shipped
            `scenes:diffusion` and `scenes:checker_train`.

    Returns:
        What the file's schema metadata holds as JSON under "diffexpo": numbers of pairs, ties and flipped
        labels, and how they came about.
    """
    ordered = sorted(scenes_of("train"), key=lambda scene: keyed_fraction("offline prompt", seed, scene.text))
    prompts = prompts_of(ordered[:num_prompts])
    plan = plan_images(prompts, {SOURCE: 1.0}, STEPS, GUIDANCES, name=f"offline {seed}")
    pipeline = load_base(base or asset_path("scenes", "diffusion"))

    def draw(items: Sequence[Planned]) -> np.ndarray:
        captions, keys = [item.caption for item in items], [item.key for item in items]
        settings = items[0]
        return draw_images(pipeline, captions, keys, steps=settings.steps, guidance=settings.guidance)

    files = [to_jpeg(image) for image in draw_planned(plan, draw)]
    stored = np.stack([from_jpeg(data) for data in files])
    scores = score_images(checker or asset_path("scenes", JUDGE), stored, [item.caption for item in plan])
    rows, labelling = label_pairs(plan, files, scores, seed, NOISE)
    facts = {
        "judge": JUDGE,
        **labelling,
        "pairs": len(rows),
        "prompts": len(prompts),
        "seed": seed,
        "steps": STEPS,
        "guidances": GUIDANCES,
        "jpeg_quality": JPEG_QUALITY,
    }
    write_pairs(rows, facts, out)
    return facts
