"""Where the preference signal lies: signal and noise of the DPO gradient by noise level and by kind of
parameter.

    .venv/bin/python benchmarks/gradient_signal.py runs/expo

Takes the online pairs of a finished run and the run's base model. The pairs are cut into disjoint chunks; g_i
is chunk i's gradient of mean(loser error - winner error) at the base, for t in one slice of [0, 1]. With n
chunks of c pairs

    signal^2 = mean over i != j of g_i . g_j        (what chunks agree on: the part that carries over to other
    pairs) noise^2  = mean |g_i|^2 - signal^2              (what they do not)
    signal^2 / (c noise^2)                          signal-to-noise ratio of one pair, an unbiased reading up
    to its own noise

The same is done in AdamW's metric (each coordinate divided by its root mean square), in which AdamW takes its
step. Written to benchmarks/results/gradient_signal.json and printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from diffexpo.assembly.objects import build_policy
from diffexpo.config import RunConfig, read_resolved
from diffexpo.data.rows import Pair
from diffexpo.data.store import Store
from diffexpo.diffusion.objectives import pair_errors
from diffexpo.rng import keyed_order, torch_generator
from diffexpo.types import Policy

KINDS = ("attn2", "attn1", "ff", "time_emb", "norm", "conv")


def read_pairs(policy: Policy, run: Path, limit: int) -> list[Pair]:
    """The run's online pairs with two latents and a prompt each, in keyed order."""
    store = Store(run / "store", create=False)
    rows = {row.pair_id: row for row in store.pairs() if row.source != "offline"}
    if not rows:
        raise SystemExit(f"{run}: no online pairs; expected a run with at least two iterations")
    return [rows[key] for key in keyed_order(rows, 0, "gradient signal")[:limit]]


def chunk_gradient(
    policy: Policy, store: Store, rows: list[Pair], low: float, high: float, name: str
) -> Tensor:
    """Flat gradient of mean(loser error - winner error) over the rows, t stratified over [low, high)."""
    size = len(rows)
    generator = torch_generator(0, "gradient signal", name)
    winner = torch.from_numpy(store.latents([row.winner_id for row in rows]))
    loser = torch.from_numpy(store.latents([row.loser_id for row in rows]))
    t = low + (high - low) * (torch.randperm(size, generator=generator) + 0.5) / size
    eps = torch.randn(winner.shape, generator=generator)
    with torch.no_grad():
        conditioning = policy.encode_prompts([row.prompt for row in rows])
    parameters = list(policy.weights.trainable().values())
    with policy.weights.use("current"):
        winner_error, loser_error = pair_errors(policy, winner, loser, eps, t, conditioning)
    gradients = torch.autograd.grad(
        (loser_error - winner_error).mean(), parameters, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


def signal_and_noise(chunks: Tensor) -> tuple[float, float]:
    """Squared signal and squared noise of (n, D) chunk gradients."""
    dots = chunks @ chunks.T
    n = len(chunks)
    signal = float((dots.sum() - dots.diag().sum()) / (n * (n - 1)))
    return signal, float(dots.diag().mean()) - signal


def kinds_of(policy: Policy) -> dict[str, Tensor]:
    """Coordinates of each kind of parameter."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for name, parameter in policy.weights.trainable().items():
        kind = next((kind for kind in KINDS if kind in name), "other")
        found.setdefault(kind, []).append(torch.arange(start, start + parameter.numel()))
        start += parameter.numel()
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def measure(policy: Policy, run: Path, chunks: int, slices: int, limit: int) -> dict[str, object]:
    rows = read_pairs(policy, run, limit)
    store = Store(run / "store", create=False)
    size = len(rows) // chunks
    by_slice = []
    for part in range(slices):
        by_slice.append(
            torch.stack(
                [
                    chunk_gradient(
                        policy,
                        store,
                        rows[i * size : (i + 1) * size],
                        part / slices,
                        (part + 1) / slices,
                        f"{part}/{i}",
                    )
                    for i in range(chunks)
                ]
            )
        )
        print(f"slice {part + 1} of {slices}", flush=True)
    result: dict[str, object] = {"pairs": size * chunks, "chunks": chunks}
    table = []
    for part, gradients in enumerate(by_slice):
        signal, noise = signal_and_noise(gradients)
        table.append(
            {
                "t": [part / slices, (part + 1) / slices],
                "signal2": signal,
                "noise2": noise,
                "per_pair": signal / (noise * size),
            }
        )
    result["slices"] = table
    whole = torch.stack(by_slice).mean(0)
    adam = whole / whole.square().mean(0).sqrt().clamp(min=1e-12)
    visits = size * slices
    result["kinds"] = {
        kind: {
            "parameters": len(index),
            "gradient": _ratio(whole[:, index], visits),
            "adamw": _ratio(adam[:, index], visits),
        }
        for kind, index in (kinds_of(policy) | {"all": torch.arange(whole.shape[1])}).items()
    }
    return result


def _ratio(chunks: Tensor, size: int) -> float:
    signal, noise = signal_and_noise(chunks)
    return signal / (noise * size)


def print_tables(result: dict[str, object]) -> None:
    print("| t | signal | noise of one pair | ratio of one pair |\n|---|---|---|---|")
    size = result["pairs"] / result["chunks"]
    for row in result["slices"]:
        signal = max(row["signal2"], 0.0) ** 0.5
        print(
            f"| {row['t'][0]:.2f} to {row['t'][1]:.2f} | {signal:.2g} | {(row['noise2'] * size) ** 0.5:.2g} "
            f"| {row['per_pair']:.1e} |"
        )
    print("\n| parameters | number | ratio of one pair, plain | in AdamW's metric |\n|---|---|---|---|")
    for kind, row in result["kinds"].items():
        print(f"| {kind} | {row['parameters']:,} | {row['gradient']:.1e} | {row['adamw']:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="Folder of a run with online pairs.")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--slices", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "gradient_signal.json"
    )
    options = parser.parse_args()
    config: RunConfig = read_resolved(options.run / "config.yaml").config
    policy = build_policy(config)
    result = measure(policy, options.run, options.chunks, options.slices, options.pairs)
    result["model"] = config.model.path
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print_tables(result)


if __name__ == "__main__":
    main()
