"""Measures the judges of looks: how well they tell damages apart, how far they agree, and that correctness
hardly matters to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffexpo.rewards.scenes import Facts, SceneLooks, load_checker
from diffexpo.worlds import asset_path
from diffexpo.worlds.scenes.compose import compose
from diffexpo.worlds.scenes.grammar import Scene, scenes_of
from worlds.emoji.draw import draw_images, to_float
from worlds.scenes.damage import KINDS, draw_damaged
from worlds.scenes.quality import facts_of, load_base
from worlds.scenes.train_looks import JUDGES, STEPS, through_autoencoder

CONTRASTS = {
    "0 against 0.25": (0.0, 0.25),
    "0 against 0.5": (0.0, 0.5),
    "0 against 1": (0.0, 1.0),
    "0.4 against 0.8": (0.4, 0.8),
}
"""Strengths of the damage in the better and in the worse image of a pair."""
DECODED = "0 against 0.5, decoded"
SIDES = 4
"""Images that the base draws of a prompt, to compare with each other."""

Score = Callable[[Tensor, Sequence[str]], Tensor]


def damaged_pairs(
    kind: str, strengths: tuple[float, float], scenes: Sequence[Scene], seed: int
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 64, 64) of scenes with a damage of the one strength, and others of the same scenes, laid
    out anew, with the other."""
    sides = []
    for side, strength in enumerate(strengths):
        rng = np.random.default_rng([seed, side])
        drawn = [draw_damaged(scene, {kind: strength}, rng, rng) for scene in scenes]
        sides.append(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous())
    return sides[0], sides[1]


def share_right(score: Score, better: Tensor, worse: Tensor, texts: Sequence[str]) -> float:
    """How often the better image of a pair scores higher."""
    return float((score(better, texts) > score(worse, texts)).float().mean())


def by_kind(judges: Mapping[str, Score], vae: AutoencoderKL, num: int) -> dict[str, dict[str, object]]:
    """Shares of held-out pairs that each judge orders right, by kind of damage and strengths."""
    scenes = scenes_of("heldout")[:num]
    texts = [scene.text for scene in scenes]
    found: dict[str, dict[str, object]] = {}
    for index, kind in enumerate(KINDS):
        found[kind] = {}
        for column, strengths in CONTRASTS.items():
            pair = damaged_pairs(kind, strengths, scenes, 100 + index)
            found[kind][column] = {name: share_right(judge, *pair, texts) for name, judge in judges.items()}
        pair = damaged_pairs(kind, CONTRASTS["0 against 0.5"], scenes, 200 + index)
        better, worse = (through_autoencoder(vae, side) for side in pair)
        found[kind][DECODED] = {
            name: share_right(judge, better, worse, texts) for name, judge in judges.items()
        }
    return found


def by_steps(judges: Mapping[str, Score], base: Path, num: int) -> dict[str, dict[str, float]]:
    """Shares of held-out prompts of which the image of more steps, from the same noise, scores higher."""
    texts = [scene.text for scene in scenes_of("heldout")[:num]]
    pipeline = load_base(base)
    drawn = {n: to_float(draw_images(pipeline, texts, texts, steps=n, guidance=1.0)) for n in STEPS}
    return {
        f"{few} against {many} steps": {
            name: share_right(judge, drawn[many], drawn[few], texts) for name, judge in judges.items()
        }
        for few, many in combinations(STEPS, 2)
    }


def couples_right(scores: Tensor, is_first: np.ndarray, is_second: np.ndarray) -> tuple[float, int]:
    """Of the couples of a first and a second image of one prompt, (prompts, images) each, the share in which
    the first scores higher, and how many there are."""
    first, second = (torch.from_numpy(np.asarray(each, dtype=bool)) for each in (is_first, is_second))
    is_couple = first[:, :, None] & second[:, None, :]
    higher = scores[:, :, None] > scores[:, None, :]
    return float(higher[is_couple].float().mean()), int(is_couple.sum())


def on_drawn(judges: Mapping[str, Score], base: Path, checker: Path, num: int) -> dict[str, object]:
    """On several images of each held-out prompt by the base: how often the judges order two of a prompt
    alike, and how often a right one (under a checker) scores above a wrong one."""
    scenes = [scene for scene in scenes_of("heldout")[:num] for _ in range(SIDES)]
    texts = [scene.text for scene in scenes]
    keys = [f"{text}/{index}" for index, text in enumerate(texts)]
    images = draw_images(load_base(base), texts, keys, steps=6, guidance=1.0)
    network, _ = load_checker("checker", str(checker))
    facts: list[Facts] = facts_of(network, images, scenes)
    right, clean, whole = (
        np.array(values).reshape(-1, SIDES)
        for values in (
            [each.all for each in facts],
            [each.clean for each in facts],
            [each.objects and each.count and each.clean for each in facts],
        )
    )
    scores = {name: judge(to_float(images), texts).view(-1, SIDES) for name, judge in judges.items()}
    first, second = scores.values()
    alike = [
        ((first[:, a] > first[:, b]) == (second[:, a] > second[:, b])).float()
        for a, b in combinations(range(SIDES), 2)
    ]
    shares = {
        name: {
            "right above wrong": couples_right(each, right, ~right),
            "right above wrong, both clean": couples_right(each, right, ~right & clean),
            "right above wrong only in colour or position": couples_right(each, right, ~right & whole),
        }
        for name, each in scores.items()
    }
    return {"the judges agree": float(torch.cat(alike).mean()), "of a prompt's images": shares}


def on_true(judges: Mapping[str, Score], num: int) -> dict[str, dict[str, float]]:
    """On true images: how often the one that the prompt asks for scores above one of another prompt, and the
    spread (standard deviations) of scores over images and over prompts."""
    rng = np.random.default_rng(13)
    scenes = scenes_of("heldout")[:num]
    texts = [scene.text for scene in scenes]
    images = to_float(np.stack([compose(scene, rng)[0] for scene in scenes]))
    found = {}
    for name, judge in judges.items():
        own = judge(images, texts)
        found[name] = {
            "own above another": float((own > judge(images.roll(1, 0), texts)).float().mean()),
            "spread over images": float(judge(images, texts[:1] * len(texts)).std()),
            "spread over prompts": float(judge(images[:1].expand(len(texts), -1, -1, -1), texts).std()),
        }
    return found


def write_looks(
    judges_in: Path, out: Path, num: int = 100, base: Path | None = None, checker: Path | None = None
) -> Path:
    """Measure both judges of a folder and write `looks.json`.

    Args:
        num: held-out scenes of each comparison, and prompts that the base draws.
        base: draws; by default the shipped one. checker: decides what is right; by default the shipped
        `checker_heldout`.
    """
    base = base or asset_path("scenes", "diffusion")
    checker = checker or asset_path("scenes", "checker_heldout")
    judges = {name: SceneLooks(name, str(judges_in / name)).score for name in JUDGES}
    vae = AutoencoderKL.from_pretrained(base / "vae").eval()
    found = {
        "by kind of damage": by_kind(judges, vae, num),
        "by steps of the sampler": by_steps(judges, base, num),
        "images of the base": on_drawn(judges, base, checker, num),
        "true images": on_true(judges, 5 * num),
    }
    out.mkdir(parents=True, exist_ok=True)
    page = out / "looks.json"
    page.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return page
