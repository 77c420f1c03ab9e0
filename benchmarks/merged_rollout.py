"""Is drawing faster with adapters folded into the weights (`explore.merge_lora`)? Images a second, merged
against adapters.

    .venv/bin/python benchmarks/merged_rollout.py

Both arms are the denoiser's calls of one collected batch (guided: two rows an image) inside one `use`, so
folding the weights counts. They run in this process on the same network and inputs, interleaved, in
alternating order; the result is the median of paired ratios. The network is the embedded one; where there is
a CUDA device, also one of Stable Diffusion 1.5's size with random weights in bfloat16. On the CPU the measure
is CPU time (`time.process_time`), elsewhere the clock, after waiting for the device. Before timing, the arms
are shown to predict the same up to rounding. Written to benchmarks/results/merged_rollout.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffexpo.assembly import resolve
from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.policies.base import load_policy
from diffexpo.policies.weights import LoraWeightSets, make_weights

RANK, STEPS = 16, 10
ADAPTERS = TuningConfig(kind="lora", lora=LoraConfig(rank=RANK))


@dataclass(frozen=True)
class Setup:
    """A denoiser with adapters, and what goes into it: (channels, height, width), (tokens, width of text)."""

    name: str
    weights: LoraWeightSets
    latent: tuple[int, int, int]
    text: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    batches: tuple[int, ...]


def emoji() -> Setup:
    """The embedded UNet, on the CPU."""
    policy = load_policy(ModelConfig(device="cpu"), ADAPTERS, folder_or_id=resolve("emoji:diffusion"), seed=0)
    text = tuple(policy.encode_prompts(["noto cat"]).tensors["encoder_hidden_states"].shape[1:])
    name = f"embedded UNet, {_millions(policy.weights)}M parameters"
    return Setup(name, policy.weights, policy.latent_shape, text, torch.device("cpu"), torch.float32, (2, 16))


def large() -> Setup:
    """Stable Diffusion 1.5's UNet at 512 pixels with random weights, on the CUDA device."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).to("cuda", torch.bfloat16)
    weights = make_weights(network, ADAPTERS, 0)
    name = f"UNet of Stable Diffusion 1.5's size, {_millions(weights)}M parameters"
    return Setup(name, weights, (4, 64, 64), (77, 768), torch.device("cuda"), torch.bfloat16, (1, 8))


def _millions(weights: LoraWeightSets) -> int:
    trained = sum(value.numel() for value in weights.trainable().values())
    return round((sum(value.numel() for value in weights.network.parameters()) - trained) / 1e6)


def shake(weights: LoraWeightSets) -> None:
    """Adapters with an update: B is 0 at the start."""
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.trainable().items():
        if ".lora_B." in name:
            value.data.copy_(0.01 * torch.randn(value.shape, generator=generator))


def make_draw(setup: Setup, images: int) -> Callable[[bool], Tensor]:
    """A function of `merged`: the denoiser's calls of one batch; returns the last prediction."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * images, *setup.latent, generator=generator).to(setup.device, setup.dtype)
    text = torch.randn(2 * images, *setup.text, generator=generator).to(setup.device, setup.dtype)

    def draw(merged: bool) -> Tensor:
        prediction = x
        with torch.no_grad(), setup.weights.use("current", merged=merged):
            for step in range(STEPS):
                times = torch.full((2 * images,), 999 - 90 * step, device=setup.device)
                prediction = setup.weights.network(x, times, encoder_hidden_states=text, return_dict=False)[0]
        return prediction

    return draw


def seconds(setup: Setup, draw: Callable[[bool], Tensor], merged: bool) -> float:
    """Of one batch."""
    is_cuda = setup.device.type == "cuda"
    clock = time.perf_counter if is_cuda else time.process_time
    if is_cuda:
        torch.cuda.synchronize()
    began = clock()
    draw(merged)
    if is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def compare(setup: Setup, images: int, rounds: int) -> dict[str, object]:
    """Images a second of both arms, and the ratio merged / adapters."""
    draw = make_draw(setup, images)
    outputs = [draw(merged).float() for merged in (False, True)]
    gap = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    assert gap < (1e-4 if setup.dtype == torch.float32 else 5e-2), f"the arms predict different things: {gap}"
    rows = []
    for turn in range(rounds):
        order = (False, True) if turn % 2 else (True, False)
        rows.append({merged: seconds(setup, draw, merged) for merged in order})
    ratios = sorted(row[False] / row[True] for row in rows)
    return {
        "model": setup.name,
        "images": images,
        "steps": STEPS,
        "adapters_images_per_s": images / statistics.median(row[False] for row in rows),
        "merged_images_per_s": images / statistics.median(row[True] for row in rows),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "rounds": rounds,
        "largest_relative_difference": gap,
        "measure": "clock" if setup.device.type == "cuda" else "CPU time",
        "device": torch.cuda.get_device_name() if setup.device.type == "cuda" else "CPU, 1 thread",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merged_rollout.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setups = [emoji()] + ([large()] if torch.cuda.is_available() else [])
    found = []
    for setup in setups:
        shake(setup.weights)
        for images in setup.batches:
            found.append(compare(setup, images, options.rounds))
            row = found[-1]
            print(
                f"{row['model']}, {images} images: merged draws {row['ratio_median']:.3f} times as many "
                f"images a second "
                f"(quartiles {row['ratio_quartiles'][0]:.3f}, {row['ratio_quartiles'][1]:.3f})"
            )
    result = {
        "results": found,
        "setting": f"LoRA rank {RANK} on the attention projections, {STEPS} guided steps, float32 on the CPU",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
