"""Every method through its own outer loop on a toy policy, small, for the tests of how a batch is split.

All is computed in float64, where rounding is far below any difference that a wrong statistic makes. AdamW's epsilon is large, so
that a step is linear in the gradient: with the usual one the first step is the gradient's sign alone.

`python -m tests.invariants.every_method FOLDER` runs all of them as one of the processes that a launcher started.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from diffexpo.config import RunConfig
from diffexpo.online.loop import Loop
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyPolicy
from diffexpo.training.distributed import World, start_world, stop_world
from tests.double import in_double
from tests.learning.toy import PATHS, PROMPTS, make_loop

BATCH = 8
OWN = {"offline": {"source": None}, "hybrid": {"decay": 0.0}, "explore": {"agents": 1}}
NO_OFFLINE = {"offline": {"source": None}}
DDIM = {"name": "ddim", "steps": 3, "guidance": 1.0, "eta": 1.0}
SDE = {"name": "flow_sde", "steps": 3, "guidance": 1.0}
ODE = {"name": "flow_euler", "steps": 3, "guidance": 1.0}
SCORE = {"type": "ddpo", "estimator": "score_function", "min_count": 100}

OWN_LOSS = f"{Path(__file__).resolve().parents[1] / 'own_losses.py'}:dpo"

METHODS: dict[str, tuple[dict[str, object], dict[str, object], dict[str, object]]] = {
    # name: (sampler, settings of the method, other settings)
    "expo": (DDIM, {"type": "expo", "beta": 30.0, "alpha": 0.5, "contrast_fraction": 0.4}, {}),
    "diffusion_dpo": (DDIM, {"type": "diffusion_dpo", "beta": 30.0, "sft_weight": 0.5, "kind": "ipo"}, {}),
    "held to the guided base": (
        DDIM,
        {"type": "expo", "beta": 30.0, "alpha": 0.5, "contrast_fraction": 0.4, "draws": 4}
        | {"reference": "ema", "anchor_weight": 0.5, "anchor_guidance": 2.0},
        {},
    ),
    "held to its reference": (
        DDIM,
        {
            "type": "diffusion_dpo",
            "auto_beta": True,
            "draws": 2,
            "anchor_weight": 0.5,
            "anchor_guidance": 2.0,
        },
        {},
    ),
    "automatic beta": (
        DDIM,
        {"type": "diffusion_dpo", "beta": 5000.0, "auto_beta": True, "safeguard": True},
        {},
    ),
    "spin": (
        DDIM,
        {"type": "spin", "beta": 30.0},
        {"hybrid": {"decay": 0.0, "offline_weight": 0.0}, "explore": {"agents": 1}},
    ),
    "python": (DDIM, {"type": "python", "path": OWN_LOSS}, {}),
    "orpo": (ODE, {"type": "orpo", "weight": 1.0}, {}),
    "mapo": (ODE, {"type": "mapo", "num_train_timesteps": 30}, {}),
    "sft": (ODE, {"type": "sft"}, NO_OFFLINE),
    "guidance_distillation": (
        DDIM | {"guidance": 2.0},
        {"type": "guidance_distillation", "guidance": 2.0, "empty_prompt_fraction": 0.3},
        NO_OFFLINE | {"explore": {"agents": 1}},
    ),
    "diffusion_kto": (DDIM, {"type": "diffusion_kto", "beta": 30.0}, {}),
    "mean of classes": (DDIM, {"type": "diffusion_kto", "beta": 30.0, "baseline": "class_mean"}, {}),
    "rwr": (ODE, {"type": "rwr", "temperature": 0.1}, NO_OFFLINE),
    "diffusion_nft": (ODE, {"type": "diffusion_nft", "old_decay": 1, "kl_weight": 0.5}, OWN),
    "awm": (ODE, {"type": "awm", "clip_range": 0.05, "kl_weight": 0.5, "global_std": False}, OWN),
    "dgpo": (DDIM, {"type": "dgpo", "beta": 30.0, "clip_range": 0.05}, {}),
    "ddpo": (DDIM, {"type": "ddpo", "clip_range": 0.05, "min_count": 4, "timestep_fraction": 0.7}, {}),
    "score function": (DDIM, SCORE, {"training": {"steps": 1}}),
    "dpok": (DDIM, {"type": "dpok", "clip_range": 0.05, "reward_weight": 5.0, "value_batch_size": 16}, {}),
    "d3po": (DDIM, {"type": "d3po", "beta": 3.0}, {}),
    "spo": (DDIM, {"type": "spo", "num_candidates": 2, "first_transition": 0, "threshold": 0.0}, {}),
    "prdp": (DDIM, {"type": "prdp", "clip_range": 0.05}, {}),
    "flow_grpo": (SDE, {"type": "flow_grpo", "clip_range": 0.05, "kl_weight": 0.5}, {}),
    "guard": (SDE, {"type": "flow_grpo", "clip_range": 0.05, "ratio": "guard", "global_std": False}, {}),
}


def make_config(name: str, micro_batch_size: int) -> RunConfig:
    """Two iterations of a few prompts, of which some come back; at least two units of images, so that two processes draw."""
    sampler, algorithm, changes = METHODS[name]
    groups: dict[str, dict[str, object]] = {
        "explore": {
            "iterations": 2,
            "prompts_per_iteration": 4,
            "images_per_prompt": 3,
            "batch_size": 8,
            "sampler": sampler,
            "negatives": {"source": None},
        },
        "training": {
            "steps": 3,
            "batch_size": BATCH,
            "micro_batch_size": micro_batch_size,
            "learning_rate": 0.1,
            "weight_decay": 0.0,
            "warmup_fraction": 0.0,
            "adam_epsilon": 1.0,
            "checkpoint_every": 1000,
        },
        "tuning": {"kind": "full"},
    }
    if name in ("ddpo", "score function", "dpok", "d3po", "spo", "prdp", "flow_grpo", "guard"):
        groups["offline"] = {"source": None}
    for group, values in changes.items():
        groups[group] = groups.get(group, {}) | dict(values)
    return RunConfig.model_validate(groups | {"algorithm": algorithm})


def run(
    name: str,
    folder: Path,
    *,
    micro_batch_size: int = BATCH,
    world: World | None = None,
    device: torch.device | str = "cpu",
) -> Loop:
    """A whole run of a method; weights and metrics stay in the folder."""
    config = make_config(name, micro_batch_size)
    path = PATHS["flow" if config.explore.sampler.name.startswith("flow") else "vp"]
    with in_double():
        loop = make_loop(config, ToyPolicy(path, device=device), folder / name, offline_pairs=24, world=world)
        loop.prompts = PROMPTS[:6]
        run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    return loop


def main(folder: Path) -> None:
    """Every method, one after the other, on the processes that were started."""
    torch.set_num_threads(1)
    world = start_world("cpu")
    for name in METHODS:
        run(name, folder, micro_batch_size=BATCH // world.size, world=world)
    stop_world(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
