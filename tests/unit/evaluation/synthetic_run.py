"""A complete run folder made of arithmetic: coloured images, plausible curves. The report cannot tell it from a real one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

from diffexpo.evaluation.records import (
    PairExample,
    SuiteResult,
    choose_pair_examples,
    save_pair_examples,
    save_suite,
)
from diffexpo.files import write_json
from diffexpo.rng import numpy_generator
from diffexpo.types import Prompt
from tests.rows import pair_row

WORDS = (
    "red heart",
    "woman firefighter: dark skin tone",
    "flag: Norway",
    "grinning face",
    "cat face",
    "rocket",
)
SIZE = 32


def make_prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(f"p{i:03d}", f"{WORDS[i % len(WORDS)]}, style {i // len(WORDS)}") for i in range(count)
    )


def make_suite(
    name: str, *, shift: float, kl: float = 0.0, vendi: float = 4.0, count: int = 48, judge: bool = True
) -> SuiteResult:
    """`shift` moves the held-out scores; images get brighter with it."""
    prompts = make_prompts(count)
    noise = numpy_generator(0, "scores").normal(size=count)
    own = numpy_generator(0, "own", name).normal(size=count)
    yy, xx = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for i in range(count):
        wave = 0.5 + 0.5 * np.sin(6 * (xx * math.cos(i) + yy * math.sin(i)) + 2 * shift)
        images[i] = (255 * np.stack([wave, yy * (0.4 + shift / 4), 1 - wave], axis=-1).clip(0, 1)).astype(
            np.uint8
        )
    scores = {"judge_train": 20 + noise + 1.3 * shift + 0.5 * own}
    roles = {"judge_train": "train"}
    if judge:
        scores = {"judge_heldout": 21 + noise + shift + 0.8 * own} | scores
        roles = {"judge_heldout": "heldout"} | roles
    return SuiteResult(
        version=name,
        prompts=prompts,
        prompt_index=np.arange(count),
        image_index=np.zeros(count, dtype=np.int64),
        images=images,
        scores=scores,
        roles=roles,
        scorers={scorer: "clip-0123; logit-scaled cosine" for scorer in scores},
        vendi={prompt.id: vendi + 0.3 * float(own[i]) for i, prompt in enumerate(prompts[:8])}
        if vendi
        else {},
        vendi_images=8 if vendi else 0,
        embedder="judge_heldout image features" if vendi else "",
        kl=[kl * (1 + 0.2 * math.sin(i)) for i in range(16)] if kl else [],
        kl_estimator="path KL per image (ancestral DDPM kernel, last noiseless step left out; 12 steps, guidance 4)"
        if kl
        else "",
        sampler={"name": "ddpm", "steps": 12, "guidance": 4.0, "eta": 0.0},
        seconds=20.0,
        network_evaluations=count * 24,
    )


def make_config() -> dict[str, object]:
    sampler = {"name": "ddpm", "steps": 12, "guidance": 4.0, "eta": 0.0}
    return {
        "name": "synthetic",
        "seed": 0,
        "model": {"path": "emoji:diffusion"},
        "tuning": {"kind": "full"},
        "explore": {"iterations": 3, "sampler": sampler},
        "rewards": [{"name": "judge_train", "type": "clip", "path": "emoji:judge_train"}],
        "algorithm": {"type": "expo", "alpha": 0.0, "beta": 500.0},
        "training": {"steps": 60, "batch_size": 32},
        "evaluation": {"num_prompts": 48, "grid_prompts": 8, "bootstrap": 500, "sampler": sampler},
    }


def train_lines(
    iteration: int, steps: int, *, rise: float = 0.0, accuracy: float = 0.66
) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        part = step / steps
        wobble = 0.01 * math.sin(7 * step + iteration)
        lines.append(
            {
                "iteration": iteration,
                "step": step,
                "phase": "train",
                "wall_s": 0.2 * step,
                "train/loss": math.log(2) - 0.05 * part + wobble,
                "train/implicit_accuracy": 0.5 + (accuracy - 0.5) * part + wobble,
                "train/winner_error": (0.30 + wobble) * (1 - 0.01 * part + rise * part),
                "train/loser_error": (0.31 + wobble) * (1 + 0.02 * part + rise * part),
                "train/winner_reference_error": 0.30 + wobble,
                "train/loser_reference_error": 0.31 + wobble,
                "train/common_part": 0.005 * part + rise,
                "train/skipped_steps": 0,
            }
        )
    return lines


def phase_lines(iteration: int) -> list[dict[str, object]]:
    collect = {
        "explore/tau": 1 - (iteration - 1) / 2,
        "rollout/negative_prompt_fraction": 0.95 - 0.45 * (iteration - 1),
        "rollout/images": 512,
        "rollout/reward/judge_train/mean": 20.0 + 0.3 * iteration,
        "rollout/reward/judge_train/std": 1.1,
        "rollout/reward/judge_train/failed": 0,
        "rollout/agent/main/reward": 20.0 + 0.2 * iteration,
        "rollout/agent/exploration/reward": 20.1 + 0.35 * iteration,
        "time/collect_s": 31.0,
        "mem/peak_gib": 1.4,
    }
    pair = {
        "pairs/groups": 64,
        "pairs/count": 61 - iteration,
        "pairs/dropped_ties": 2 + iteration,
        "pairs/dropped_nan": 1,
        "pairs/margin_mean": 2.4 - 0.2 * iteration,
        "pairs/winner_from_exploration": 0.55 + 0.03 * iteration,
        "pairs/loser_from_exploration": 0.47,
        "pairs/winner_from_negative": 0.4 - 0.1 * iteration,
        "time/pair_s": 0.2,
    }
    return [
        {"iteration": iteration, "step": None, "phase": "collect", "wall_s": 1.0} | collect,
        {"iteration": iteration, "step": None, "phase": "pair", "wall_s": 1.2} | pair,
    ]


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_run(root: Path, *, baseline_shift: float = 0.5) -> Path:
    """Three iterations and an offline baseline; every file the report reads."""
    run_dir = root / "runs" / "synthetic"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(make_config(), sort_keys=False), encoding="utf-8")
    write_json(run_dir / "env.json", {"diffexpo": "0.1.0", "python": "3.11.9", "machine": {"cores": 2}})
    write_json(run_dir / "status.json", {"state": "finished"})
    shifts = {"base": (0.0, 0.0, 4.6), "iteration-1": (0.4, 2.1, 4.5), "iteration-2": (0.8, 5.5, 4.3)}
    shifts |= {"iteration-3": (1.1, 9.8, 4.1), "baseline": (baseline_shift, 7.0, 4.2)}
    for name, (shift, kl, vendi) in shifts.items():
        save_suite(make_suite(name, shift=shift, kl=kl, vendi=vendi), run_dir / "eval" / name)
    lines: list[dict[str, object]] = []
    for iteration in (1, 2, 3):
        lines += train_lines(iteration, 60)
        summary = {"iteration": iteration, "step": None, "phase": "train_summary", "wall_s": 9.0}
        lines.append(summary | {"time/train_s": 55.0, "mem/peak_gib": 2.2, "train/loss": 0.65})
        lines += phase_lines(iteration) if iteration < 3 else []
    write_lines(run_dir / "metrics.jsonl", lines)
    write_lines(run_dir / "baseline" / "metrics.jsonl", train_lines(1, 276))
    make_examples(run_dir)
    return run_dir


def make_examples(run_dir: Path) -> None:
    images = make_suite("pairs", shift=0.6).images
    for iteration in (1, 2):
        pairs = [pair_row(f"{iteration}-{i}", "w", "l", margin=0.3 + (i * 7 % 11) / 4) for i in range(9)]
        examples = []
        for index, (rule, pair) in enumerate(choose_pair_examples(pairs)):
            example = PairExample(
                pair_id=pair.pair_id,
                iteration=iteration,
                prompt=WORDS[index + iteration],
                rule=rule,
                margin=pair.margin,
                winner_agent="exploration",
                loser_agent="main",
                loser_negative="blurry",
                winner_scores={"judge_train": 22.4},
                loser_scores={"judge_train": 20.1},
            )
            examples.append((example, images[index], images[index + 9]))
        save_pair_examples(run_dir, iteration, examples)
