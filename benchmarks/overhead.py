"""What the framework costs: our training step and our rollout against hand-written torch loops that do the
same forwards.

    .venv/bin/python benchmarks/overhead.py

Both arms run in this process on the same network, data and thread, interleaved in turn; the measure is CPU
time (`time.process_time`), the result the median of paired ratios. Before timing, the arms are shown to
compute the same thing: the first losses agree to 1e-6, later ones to 5e-5, latents to 1e-3. Written to
benchmarks/results/overhead.json.

The bare training loop: noise, one forward of [winner; loser], one reference forward without gradients, the
logistic loss, backward, clip, AdamW. The bare rollout: DDIM (eta 1) with guidance in one batched forward,
noise from one generator an image, then the decoder. Ours adds keyed noise, the store's latents, metrics,
finite checks, the check of the first step and log lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from diffexpo.algorithms import algorithm_class
from diffexpo.assembly import resolve
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.schema import (
    HybridConfig,
    ModelConfig,
    SamplerConfig,
    TrainingConfig,
    TuningConfig,
)
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.pairs import PairLoader, pair_index
from diffexpo.data.rows import Pair, Sample
from diffexpo.data.store import Store
from diffexpo.diffusion.objectives import NoiseDraw
from diffexpo.online.units import draw_latents
from diffexpo.policies.base import load_policy
from diffexpo.rng import torch_generator
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter

PAIRS, STEPS, IMAGES, BETA, RATE = 16, 6, 16, 500.0, 1e-6
SAMPLER = SamplerConfig(name="ddim", steps=10, eta=1.0, guidance=4.0)


def make_store(root: Path, shape: tuple[int, int, int]) -> Store:
    """Random latents as offline pairs of one prompt each."""
    store, draw = Store(root), np.random.default_rng(0)
    samples, pairs, latents = [], [], []
    for index in range(PAIRS * STEPS):
        shared = {"prompt_id": f"p{index}", "prompt": f"noto cat {index}", "source": "offline"}
        for side in ("winner", "loser"):
            samples.append(Sample(sample_id=f"{side}-{index}", agent="offline", **shared))
            latents.append(draw.normal(size=shape).astype(np.float32))
        names = {"winner_id": f"winner-{index}", "loser_id": f"loser-{index}"}
        pairs.append(Pair(pair_id=f"pair-{index}", judge="none", **names, **shared))
    store.append_unit(0, 0, 0, samples, np.stack(latents), stage="offline")
    store.append_pairs(0, 0, pairs, stage="offline")
    store.write_manifest("offline", 0, {})
    return store


class Bench:
    """One policy and both arms of both measurements."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.policy = load_policy(
            ModelConfig(device="cpu"), TuningConfig(), folder_or_id=resolve("emoji:diffusion"), seed=0
        )
        self.policy.weights.copy("base", "reference")
        self.start = self.policy.weights.state("current")
        self.embeddings = PromptEmbeddings(self.policy, [""])
        self.store = make_store(root / "store", self.policy.latent_shape)
        self.index = pair_index(self.store, HybridConfig(), 1)
        self.embeddings.add(self.index.prompts())
        self.settings = TrainingConfig(
            steps=STEPS,
            batch_size=PAIRS,
            micro_batch_size=PAIRS,
            learning_rate=RATE,
            warmup_fraction=0.0,
            checkpoint_every=10**6,
        )
        self.turn = 0

    def loader(self) -> PairLoader:
        return PairLoader(self.store, self.index, self.embeddings, batch_size=PAIRS, run_seed=0, iteration=1)

    def our_training(self) -> list[float]:
        self.turn += 1
        folder = self.root / f"turn-{self.turn}"
        self.policy.weights.load("current", self.start)
        algorithm = algorithm_class("diffusion_dpo")(
            DiffusionDpoConfig(beta=BETA, empty_prompt_fraction=0.0),
            self.embeddings.select([""]),
        )
        metrics = MetricsWriter(folder / "metrics.jsonl")
        engine = Engine(self.policy, algorithm, self.settings, metrics)
        engine.train_iteration(1, self.loader(), steps=STEPS, checkpoint_dir=folder / "c", run_seed=0)
        return [json.loads(line)["train/loss"] for line in metrics.path.read_text().splitlines()]

    def bare_training(self) -> list[float]:
        policy, losses = self.policy, []
        policy.weights.load("current", self.start)
        parameters = list(policy.weights.trainable().values())
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2)
        loader = self.loader()
        for step in range(STEPS):
            batch = loader.batch(step)
            eps, t = NoiseDraw.keyed(batch.keys, (0, 1, "train", step), policy.path, policy.latent_shape)
            alpha, sigma = (value.float().reshape(-1, 1, 1, 1) for value in policy.path.alpha_sigma(t))
            both = torch.cat([alpha * batch.winner + sigma * eps, alpha * batch.loser + sigma * eps])
            embeds = batch.conditioning.tensors["encoder_hidden_states"].repeat(2, 1, 1)
            times, target = policy.path.timestep(t).repeat(2), torch.cat([eps, eps])
            with policy.weights.use("reference"), torch.no_grad():
                reference = policy.weights.network(both, times, embeds).sample
            with policy.weights.use("current"):
                prediction = policy.weights.network(both, times, embeds).sample
            ours = (prediction - target).square().mean(dim=(1, 2, 3))
            theirs = (reference - target).square().mean(dim=(1, 2, 3))
            gap = (ours - theirs)[:PAIRS] - (ours - theirs)[PAIRS:]
            loss = -functional.logsigmoid(-0.5 * BETA * gap).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses

    def our_rollout(self) -> torch.Tensor:
        keys = [(0, 1, "bench", index) for index in range(IMAGES)]
        texts = [f"noto cat {index}" for index in range(IMAGES)]
        with self.policy.weights.use("base"):
            latents = draw_latents(
                self.policy, self.embeddings, SAMPLER, keys, texts, [""] * IMAGES, lambda: None
            )
        self.policy.decode_latents(latents)
        return latents

    @torch.no_grad()
    def bare_rollout(self) -> torch.Tensor:
        from diffexpo.diffusion.transitions import sampler_grid

        policy = self.policy
        generators = [torch_generator(0, 1, "bench", index) for index in range(IMAGES)]

        def noise() -> torch.Tensor:
            return torch.stack(
                [torch.randn(policy.latent_shape, generator=generator) for generator in generators]
            )

        embeds = torch.cat(
            [self.embeddings.select([""] * IMAGES).tensors["encoder_hidden_states"]]
            + [
                self.embeddings.select([f"noto cat {i}" for i in range(IMAGES)]).tensors[
                    "encoder_hidden_states"
                ]
            ]
        )
        x = noise()
        network = policy.weights.base_module
        for step in sampler_grid(policy.path, "ddim", SAMPLER.steps, 1.0):
            time_step = policy.path.timestep(torch.tensor([step.t])).repeat(2 * IMAGES)
            unconditional, conditional = network(torch.cat([x, x]), time_step, embeds).sample.chunk(2)
            eps = unconditional + SAMPLER.guidance * (conditional - unconditional)
            x0 = (x - step.sigma_t * eps) / step.alpha_t
            ratio = step.alpha_t / step.alpha_s
            std = (max(step.sigma_s**2 / step.sigma_t**2 * (1 - ratio**2), 0.0)) ** 0.5
            x = step.alpha_s * x0 + max(step.sigma_s**2 - std**2, 0.0) ** 0.5 * eps
            if std > 0:
                x = x + std * noise()
        policy.decode_latents(x)
        return x


def compare(ours: Callable[[], object], bare: Callable[[], object], rounds: int) -> dict[str, object]:
    """Paired CPU-time ratios, arms in alternating order."""
    ours(), bare()
    rows = []
    for turn in range(rounds):
        seconds = {}
        for name, arm in (("ours", ours), ("bare", bare))[:: 1 if turn % 2 else -1]:
            began = time.process_time()
            arm()
            seconds[name] = time.process_time() - began
        rows.append(seconds)
    ratios = sorted(row["ours"] / row["bare"] for row in rows)
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
        "bare_cpu_s": statistics.median(row["bare"] for row in rows),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        losses = np.array(bench.our_training()), np.array(bench.bare_training())
        gaps = np.abs(losses[0] - losses[1])
        # The first loss is the same sum; later ones follow updates in which AdamW amplifies rounding-sized
        # gradients.
        assert gaps[0] < 1e-6 and gaps.max() < 5e-5, f"the arms differ: {losses}"
        latents = bench.our_rollout(), bench.bare_rollout()
        gap = float((latents[0] - latents[1]).abs().max())
        assert gap < 1e-3, f"the arms draw different latents: {gap}"
        result = {
            "training": compare(bench.our_training, bench.bare_training, options.rounds),
            "rollout": compare(bench.our_rollout, bench.bare_rollout, options.rounds),
            "largest_loss_difference": float(np.abs(losses[0] - losses[1]).max()),
            "largest_latent_difference": gap,
            "setting": f"{PAIRS} pairs a step, {STEPS} steps; {IMAGES} images, {SAMPLER.steps} DDIM steps with guidance; 1 thread",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("training", "rollout"):
        print(
            f"{name}: {result[name]['overhead_percent']:+.1f}% CPU time over a bare loop (quartiles "
            f"{result[name]['ratio_quartiles']})"
        )


if __name__ == "__main__":
    main()
