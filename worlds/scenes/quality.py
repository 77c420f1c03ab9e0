"""Measures how good the bases and the checkers of the scenes are, and draws grids with the verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import nn

from diffexpo.rewards.scenes import Facts, find_sprites, load_checker, scene_facts
from diffexpo.worlds.keyed import keyed_fraction
from diffexpo.worlds.scenes.compose import compose
from diffexpo.worlds.scenes.grammar import KINDS, Scene, scenes_of
from worlds.emoji.draw import draw_grid, draw_images, to_float
from worlds.emoji.quality import bootstrap
from worlds.scenes.train_checker import CHECKERS, Errors

STEPS = 6
GUIDANCES = (1.0, 2.5, 4.0)
FACTS = ("objects", "count", "look", "position", "clean", "all")


def facts_of(checker: nn.Module, images: np.ndarray, scenes: Sequence[Scene]) -> list[Facts]:
    """The facts that a checker finds in images (N, 64, 64, 3) of uint8."""
    findings = [found for part in to_float(images).split(100) for found in find_sprites(checker, part)]
    return [scene_facts(found, scene) for found, scene in zip(findings, scenes, strict=True)]


def load_base(folder: Path) -> StableDiffusionPipeline:
    """A base's pipeline, drawing with DPM-Solver++."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def draw_scenes(folder: Path, scenes: Sequence[Scene], guidance: float, steps: int = STEPS) -> np.ndarray:
    """Images (N, 64, 64, 3) of uint8 of a base, each prompt with noise of its own key."""
    texts = [scene.text for scene in scenes]
    return draw_images(load_base(folder), texts, texts, steps=steps, guidance=guidance)


def share_text(values: Sequence[bool]) -> str:
    """A share with its 95% interval, in percent."""
    mean, low, high = bootstrap([float(value) for value in values], [str(i) for i in range(len(values))])
    return f"{100 * mean:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def measure_checker(checker: nn.Module, num: int = 1000) -> dict[str, str]:
    """How a checker does on true images: of their own prompts, of wrong prompts, and with spoilt sprites."""
    rng = np.random.default_rng(11)
    scenes = scenes_of("heldout")[:num]
    images = np.stack([compose(scene, rng)[0] for scene in scenes])
    right = facts_of(checker, images, scenes)
    others = [scenes[(index + 1) % len(scenes)] for index in range(len(scenes))]
    wrong = [
        facts.all
        for facts, scene, other in zip(facts_of(checker, images, others), scenes, others, strict=True)
        if {thing.name for thing in scene.things} != {thing.name for thing in other.things}
    ]
    found = {f"facts, {name}": share_text([getattr(facts, name) for facts in right]) for name in FACTS}
    return found | {
        "another prompt refused": share_text([not each for each in wrong]),
        "sprites beside spoilt ones": str(Errors.measure(checker)),
    }


def measure_base(
    folder: Path, checkers: dict[str, nn.Module], num: int, guidances: Sequence[float] = GUIDANCES
) -> dict[str, dict[str, str]]:
    """Shares of held-out prompts that a base draws entirely right, by guidance, kind and combination, and how
    often the checkers agree."""
    scenes = scenes_of("heldout")[:num]
    found = {}
    for guidance in guidances:
        images = draw_scenes(folder, scenes, guidance)
        verdicts = {name: [f.all for f in facts_of(net, images, scenes)] for name, net in checkers.items()}
        heldout, other = verdicts["checker_heldout"], verdicts["checker_train"]
        rows = {name: share_text(values) for name, values in verdicts.items()}
        for kind in KINDS:
            rows[kind] = share_text([v for v, s in zip(heldout, scenes, strict=True) if s.kind == kind])
        for is_heldout, label in ((False, "new prompts"), (True, "unseen combinations")):
            rows[label] = share_text(
                [v for v, s in zip(heldout, scenes, strict=True) if s.is_heldout == is_heldout]
            )
        rows["checkers agree"] = share_text([a == b for a, b in zip(heldout, other, strict=True)])
        found[f"guidance {guidance:g}"] = rows
    return found


def write_grids(folder: Path, checkers: dict[str, nn.Module], out: Path, num: int, guidance: float) -> None:
    """Write `verdicts.png` (100 prompts with the smallest keyed hash) and `disagreements.png`."""
    scenes = sorted(scenes_of("heldout")[:num], key=lambda scene: keyed_fraction("grid", scene.text))
    images = draw_scenes(folder, scenes, guidance)
    verdicts = {name: [f.all for f in facts_of(net, images, scenes)] for name, net in checkers.items()}
    both = list(zip(verdicts["checker_heldout"], verdicts["checker_train"], strict=True))
    titles = [f"{'ok' if held else '--'} {scene.text}" for (held, _), scene in zip(both, scenes, strict=True)]
    draw_grid(images[:100], titles[:100], 10).save(out / "verdicts.png")
    differ = [index for index, (held, trained) in enumerate(both) if held != trained]
    if differ:
        draw_grid(images[differ], [titles[index] for index in differ], 10).save(out / "disagreements.png")


def write_quality(base: Path, checkers_in: Path, out: Path, num: int = 500) -> Path:
    """Measure everything and write `quality.json` and the grids."""
    torch.manual_seed(0)
    checkers = {name: load_checker(name, str(checkers_in / name))[0] for name in CHECKERS}
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {name: measure_checker(network) for name, network in checkers.items()}
    found["base"] = measure_base(base, checkers, num)
    write_grids(base, checkers, out, num, guidance=2.5)
    page = out / "quality.json"
    page.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return page
