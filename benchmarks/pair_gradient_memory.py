"""Peak memory of a pair loss's gradient on the emoji UNet: one joint backward, or two halves one after the
other.

    python benchmarks/pair_gradient_memory.py [--pairs 48]

Each mode runs in a process of its own. On the CPU the peak is the resident set, less what it was before the
first step; on an accelerator it is the allocator's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

MODES = ("joint", "two_pass")


def measure(mode: str, pairs: int, steps: int) -> dict[str, float]:
    """Peak MiB over the state before the first step, and seconds a step."""
    import torch

    from diffexpo.algorithms import DiffusionDpo
    from diffexpo.assembly.aliases import resolve
    from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
    from diffexpo.config.schema import ModelConfig, TuningConfig
    from diffexpo.policies.base import load_policy
    from diffexpo.types import PairBatch

    model = ModelConfig(path="emoji:diffusion")
    policy = load_policy(model, TuningConfig(kind="full"), folder_or_id=resolve(model.path), seed=0)
    algorithm = DiffusionDpo(DiffusionDpoConfig(beta=1000.0, empty_prompt_fraction=0.0))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, pairs, *policy.latent_shape, generator=generator).to(policy.device)
    conditioning = policy.encode_prompts(["cat"] * pairs)
    batch = PairBatch(latents[0], latents[1], conditioning, tuple(str(row) for row in range(pairs)))
    parameters = policy.weights.trainable().values()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        algorithm.loss(
            policy, PairBatch(latents[0, :1], latents[1, :1], conditioning.select([0]), ("a",)), (0,)
        )
    before = peak(policy.device)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        if mode == "joint":
            algorithm.loss(policy, batch, (0, step)).loss.backward()
        else:
            for output in algorithm.loss_in_parts(policy, batch, (0, step)):
                output.loss.backward()
        seconds.append(time.perf_counter() - began)
    return {"peak_mib": round(peak(policy.device) - before, 1), "step_s": round(min(seconds), 2)}


def peak(device: object) -> float:
    """Largest memory so far, MiB."""
    import torch

    if torch.device(str(device)).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--mode", choices=MODES)
    options = parser.parse_args()
    if options.mode is not None:
        print(json.dumps(measure(options.mode, options.pairs, options.steps)))
        return
    found = {}
    for mode in MODES:
        arguments = [sys.executable, __file__, "--mode", mode]
        arguments += ["--pairs", str(options.pairs), "--steps", str(options.steps)]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        found[mode] = json.loads(done.stdout.splitlines()[-1])
    share = found["two_pass"]["peak_mib"] / found["joint"]["peak_mib"]
    print(json.dumps({"pairs": options.pairs, **found, "memory_ratio": round(share, 3)}, indent=1))


if __name__ == "__main__":
    main()
