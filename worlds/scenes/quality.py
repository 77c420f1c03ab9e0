"""Measures how good the bases and the checkers of the scenes are, and draws grids with the verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import nn

from diffexpo.rewards.scenes import Facts, find_sprites, load_checker, scene_facts
from diffexpo.worlds.keyed import keyed_fraction
from diffexpo.worlds.scenes.compose import compose
from diffexpo.worlds.scenes.grammar import KINDS, Scene, scenes_of
from worlds.emoji.draw import draw_grid, draw_images, to_float
from worlds.emoji.quality import bootstrap
from worlds.scenes.responses import caption_scales, order_response
from worlds.scenes.train_checker import CHECKERS, Errors

STEPS, FLOW_STEPS = 10, 8
GUIDANCES = (1.0, 2.5, 4.0)
FACTS = ("objects", "count", "look", "position", "clean", "all")


def facts_of(checker: nn.Module, images: np.ndarray, scenes: Sequence[Scene]) -> list[Facts]:
    """The facts that a checker finds in images (N, 64, 64, 3) of uint8."""
    findings = [found for part in to_float(images).split(100) for found in find_sprites(checker, part)]
    return [scene_facts(found, scene) for found, scene in zip(findings, scenes, strict=True)]


def is_flow(folder: Path) -> bool:
    """Whether a base is the flow base."""
    return "StableDiffusion3Pipeline" in (folder / "model_index.json").read_text(encoding="utf-8")


def load_base(folder: Path) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """A base's pipeline, drawing with DPM-Solver++ or, of the flow base, with Euler steps."""
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline
    if is_flow(folder):
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
        )
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_scenes(
    folder: Path, scenes: Sequence[Scene], guidance: float, steps: int | None = None
) -> np.ndarray:
    """Images (N, 64, 64, 3) of uint8 of a base, each prompt with noise of its own key, in `STEPS` steps of
    the diffusion base, `FLOW_STEPS` of the flow base, or as many as are said."""
    texts = [scene.text for scene in scenes]
    steps = steps or (FLOW_STEPS if is_flow(folder) else STEPS)
    return draw_images(load_base(folder), texts, texts, steps=steps, guidance=guidance, absent_tokens=0)


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
    folder: Path,
    checkers: dict[str, nn.Module],
    num: int,
    steps: int | None = None,
    guidances: Sequence[float] = GUIDANCES,
) -> dict[str, dict[str, str]]:
    """Shares of held-out prompts that a base draws entirely right, by guidance, kind and combination, and how
    often the checkers agree."""
    scenes = scenes_of("heldout")[:num]
    found = {}
    for guidance in guidances:
        images = draw_scenes(folder, scenes, guidance, steps)
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


def write_grids(
    folder: Path, checkers: dict[str, nn.Module], out: Path, num: int, guidance: float, steps: int | None
) -> None:
    """Write `verdicts.png` (100 prompts with the smallest keyed hash) and `disagreements.png`."""
    scenes = sorted(scenes_of("heldout")[:num], key=lambda scene: keyed_fraction("grid", scene.text))
    images = draw_scenes(folder, scenes, guidance, steps)
    verdicts = {name: [f.all for f in facts_of(net, images, scenes)] for name, net in checkers.items()}
    both = list(zip(verdicts["checker_heldout"], verdicts["checker_train"], strict=True))
    titles = [f"{'ok' if held else '--'} {scene.text}" for (held, _), scene in zip(both, scenes, strict=True)]
    draw_grid(images[:100], titles[:100], 10).save(out / "verdicts.png")
    differ = [index for index, (held, trained) in enumerate(both) if held != trained]
    if differ:
        draw_grid(images[differ], [titles[index] for index in differ], 10).save(out / "disagreements.png")


def as_table(found: dict[str, dict[str, str]]) -> str:
    """The shares of a base as a Markdown table, a row for each guidance."""
    columns = list(next(iter(found.values())))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[guidance, *rows.values()] for guidance, rows in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_quality(base: Path, checkers_in: Path, out: Path, num: int = 500, steps: int | None = None) -> Path:
    """Measure everything, print the base's table and write `quality.json` and the grids."""
    torch.manual_seed(0)
    checkers = {name: load_checker(name, str(checkers_in / name))[0] for name in CHECKERS}
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, object] = {name: measure_checker(network) for name, network in checkers.items()}
    shares = measure_base(base, checkers, num, steps)
    print(as_table(shares), flush=True)
    write_grids(base, checkers, out, num, guidance=2.5, steps=steps)
    page = out / "quality.json"
    responses: dict[str, object] = {}
    if not is_flow(base):
        pipeline = load_base(base)
        responses = {"order response": order_response(pipeline), "caption scales": caption_scales(pipeline)}
    for name, value in responses.items():
        print(f"{name}: {value}", flush=True)
    page.write_text(json.dumps(found | {"base": shares} | responses, indent=2) + "\n", encoding="utf-8")
    return page
