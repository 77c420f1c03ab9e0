"""What `model.inference_precision` and `model.channels_last` save: CPU seconds with and without each, on a
shipped base.

    .venv/bin/python benchmarks/speed_settings.py

Drawing is `IMAGES` images in a few guided steps, decoding is the same images, a training step is the loss of
`PAIRS` pairs with its reference and the backward. Both arms run in this process, on one thread, interleaved
in alternating order; the measure is CPU time (`time.process_time`), the result the median of paired ratios.
Other work on the machine moves it less than the clock, and still moves it: the load is written beside it.
Before timing, the arms are compared. Written to benchmarks/results/speed_settings.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffexpo.algorithms import algorithm_class
from diffexpo.assembly import resolve
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.schema import ModelConfig, SamplerConfig, TuningConfig
from diffexpo.diffusion.sampling import NoiseSource, sample
from diffexpo.policies.base import load_policy
from diffexpo.policies.family import FamilyPolicy
from diffexpo.rng import torch_generator
from diffexpo.types import PairBatch

IMAGES, PAIRS = 32, 16
SAMPLER = SamplerConfig(name="ddim", steps=4, guidance=3.0)
SETTINGS = {
    "inference_precision=bf16": {"inference_precision": "bf16"},
    "channels_last=true": {"channels_last": True},
    "both": {"inference_precision": "bf16", "channels_last": True},
}
Work = Callable[[], Tensor]


def load(model: str, **settings: object) -> dict[str, Work]:
    """What is measured, on a policy of its own, fully fine-tuned."""
    policy = load_policy(
        ModelConfig(device="cpu", **settings), TuningConfig(), folder_or_id=resolve(model), seed=0
    )
    policy.weights.copy("base", "reference")
    text, empty = policy.encode_prompts(["a red circle"]), policy.encode_prompts([""])
    texts, empties = type(text).concatenate([text] * IMAGES), type(text).concatenate([empty] * IMAGES)
    latents = torch.randn(IMAGES, *policy.latent_shape, generator=torch_generator("latents"))

    def draw() -> Tensor:
        noise = NoiseSource([torch_generator("noise", i) for i in range(IMAGES)], policy.latent_shape)
        return sample(policy, texts, empties, SAMPLER, noise)

    return {
        "drawing": draw,
        "decoding": lambda: policy.decode_latents(latents),
        "a training step": lambda: train(policy, latents[:PAIRS], latents[-PAIRS:]),
    }


def train(policy: FamilyPolicy, winner: Tensor, loser: Tensor) -> Tensor:
    """The loss of a step, with its backward."""
    algorithm = algorithm_class("diffusion_dpo")(
        DiffusionDpoConfig(beta=200.0, empty_prompt_fraction=0.0), policy.encode_prompts([""])
    )
    keys = tuple(f"pair-{number}" for number in range(PAIRS))
    batch = PairBatch(winner, loser, policy.encode_prompts(["a red circle"] * PAIRS), keys)
    loss = algorithm.loss(policy, batch, ("bench",)).loss
    loss.backward()
    for parameter in policy.weights.trainable().values():
        parameter.grad = None
    return loss.detach()


def seconds(work: Work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def compare(plain: Work, other: Work, rounds: int) -> dict[str, float | list[float]]:
    """CPU seconds of both, how many times as fast the other is, and by how much its result differs."""
    expected, found = plain(), other()
    rows = []
    for turn in range(rounds):
        order = (plain, other) if turn % 2 else (other, plain)
        taken = {work: seconds(work) for work in order}
        rows.append((taken[plain], taken[other]))
    ratios = sorted(first / second for first, second in rows)
    return {
        "plain_cpu_s": statistics.median(first for first, _ in rows),
        "setting_cpu_s": statistics.median(second for _, second in rows),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "relative_difference": float((found - expected).norm() / expected.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="scenes:diffusion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed_settings.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, results = load(options.model), {}
    for name, settings in SETTINGS.items():
        other = load(options.model, **settings)
        for what, work in plain.items():
            row = results[f"{name}, {what}"] = compare(work, other[what], options.rounds)
            low, high = row["ratio_range"]
            print(
                f"{name}, {what}: {row['plain_cpu_s']:.3f} s -> {row['setting_cpu_s']:.3f} s CPU, "
                f"{row['ratio']:.2f} times as fast (range {low:.2f} to {high:.2f}), "
                f"differs by {row['relative_difference']:.1e}",
                flush=True,
            )
    cpu = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {cpu}, torch {torch.__version__}, 1 thread"
    found = {"model": options.model, "rounds": options.rounds, "results": results, "machine": machine}
    found["load"] = [round(value, 2) for value in os.getloadavg()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
