"""Networks of real size with random weights: how fast they draw and learn here, and what memory they take.

    .venv/bin/python benchmarks/real_size.py                     # on an accelerator: all models; on a CPU:
    one tiny EXPO iteration .venv/bin/python benchmarks/real_size.py --models sd15 sdxl --batch 16

Speed does not depend on what the weights are, so nothing is downloaded: networks are made from the public
settings in `estimate/architectures.json` and saved as diffusers folders, then loaded as any model is.

On an accelerator, for each model, eager and compiled: images/s at 50 and 20 steps with guidance at 512 pixels
(denoiser and decoder), pairs/s of a Diffusion-DPO step with a LoRA, peak memory beside the estimate, and the
share of the operations a second that a large matrix product reaches on the same device. On a CPU: one EXPO
iteration of the network of SD 1.5 at 128 pixels with a LoRA through the `run` command (2 prompts, 2 agents
with an image each, 2 steps), with the seconds of each phase. Written to benchmarks/results/real_size.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffexpo.algorithms import DiffusionDpo
from diffexpo.assembly.aliases import resolve
from diffexpo.config import load_config
from diffexpo.config.families import Family, checkpoints
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.schema import LoraConfig, ModelConfig, SamplerConfig, TuningConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.estimate.activations import forward_flops
from diffexpo.estimate.networks import published_settings, read_blueprint
from diffexpo.estimate.resources import estimate
from diffexpo.online.units import draw_latents
from diffexpo.policies.base import load_policy
from diffexpo.policies.family import class_of
from diffexpo.types import PairBatch, Policy

GIB = 2**30
PROMPT = "a photo of a cat"
SCHEDULERS = {
    "vp": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}


def make_folder(checkpoint: str, root: Path, device: torch.device) -> Path:
    """A diffusers folder of the architecture with random half-precision weights, without T5."""
    folder, (family, _) = root / checkpoint, checkpoints()[checkpoint]
    is_flow = family.pipeline == "StableDiffusion3Pipeline"
    index: dict[str, object] = {"_class_name": family.pipeline, "_diffusers_version": "0.42.1"}
    torch.manual_seed(0)
    for name, (class_name, settings) in published_settings(checkpoint).items():
        if class_name == "T5EncoderModel":
            index |= {name: [None, None], name.replace("text_encoder", "tokenizer"): [None, None]}
            continue
        network_class = class_of(class_name)
        with torch.device(device):
            if hasattr(network_class, "from_config"):
                network = network_class.from_config(dict(settings))
            else:
                network = network_class(network_class.config_class.from_dict(dict(settings)))
        network.to(torch.float16).save_pretrained(str(folder / name))
        library = "diffusers" if hasattr(network_class, "from_config") else "transformers"
        index[name] = [library, class_name]
        del network
        if name.startswith("text_encoder"):
            # Any tokenizer will do: the embedded one, for each encoder.
            tokenizer = name.replace("text_encoder", "tokenizer")
            shutil.copytree(Path(resolve("emoji:diffusion")) / "tokenizer", folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    scheduler = SCHEDULERS["flow" if is_flow else "vp"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def timed(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Fastest of some runs, seconds; the first is a warm-up."""
    best = float("inf")
    for turn in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        if turn:
            best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: left @ right, device)


def measure_model(
    family: Family, folder: Path, device: torch.device, batch: int, mode: str
) -> dict[str, object]:
    """Images/s, pairs/s, peak memory and share of the matrix rate of one model, eager or compiled."""
    model = ModelConfig(
        dtype="bfloat16",
        resolution=512,
        vae_slicing=True,
        channels_last=family.pipeline != "StableDiffusion3Pipeline",
        compile="blocks" if mode == "compiled" else "off",
        drop_t5=True,
    )
    tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=16))
    policy = load_policy(model, tuning, folder_or_id=str(folder), seed=0, gradient_checkpointing=True)
    blueprint = read_blueprint(str(folder), model)
    flops, rate = forward_flops(blueprint), matrix_rate(device, torch.bfloat16)
    found: dict[str, object] = {"tflop_per_forward": flops / 1e12, "matrix_product_tflop_s": rate / 1e12}
    for steps in (50, 20):
        seconds, peak = draw(policy, steps, batch, device)
        share = 2 * steps * batch * flops / seconds / rate
        found[f"draw_{steps}_steps"] = {
            "images_per_s": batch / seconds,
            "peak_gib": peak,
            "share_of_matrix_rate": share,
        }
    pairs = max(1, batch // 2)
    seconds, peak = learn(policy, pairs, device)
    # Policy and reference forward, backward, and the forward that checkpointing repeats; a LoRA's backward is
    # about one forward.
    share = 2 * pairs * 4 * flops / seconds / rate
    found["lora_pairs"] = {
        "pairs": pairs,
        "pairs_per_s": pairs / seconds,
        "peak_gib": peak,
        "share_of_matrix_rate": share,
    }
    return found


def draw(policy: Policy, steps: int, batch: int, device: torch.device) -> tuple[float, float]:
    """Seconds and peak GiB of drawing and decoding a batch with guidance."""
    is_flow = policy.path.kind == "flow"
    sampler = SamplerConfig(name="flow_euler" if is_flow else "ddim", steps=steps, guidance=5.0)
    embeddings = PromptEmbeddings(policy, ["", PROMPT])
    keys = [(0, 0, "bench", index) for index in range(batch)]

    def once() -> None:
        with policy.weights.use("base"), torch.no_grad():
            latents = draw_latents(
                policy, embeddings, sampler, keys, [PROMPT] * batch, [""] * batch, lambda: None
            )
            policy.decode_latents(latents)

    return _with_peak(once, device)


def learn(policy: Policy, pairs: int, device: torch.device) -> tuple[float, float]:
    """Seconds and peak GiB of one optimiser step on pairs."""
    algorithm = DiffusionDpo(DiffusionDpoConfig(beta=1000.0, empty_prompt_fraction=0.0))
    latents = torch.randn(2, pairs, *policy.latent_shape, device=device)
    conditioning = policy.encode_prompts([PROMPT] * pairs)
    batch = PairBatch(latents[0], latents[1], conditioning, tuple(str(row) for row in range(pairs)))
    parameters = list(policy.weights.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def once() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False):
            loss = algorithm.loss(policy, batch, (0,)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _with_peak(once, device)


def _with_peak(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(run, device)
    return seconds, torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")


def expo_iteration(root: Path) -> dict[str, object]:
    """One EXPO iteration of the network of SD 1.5 through the `run` command; seconds of each phase and the
    peak of the process."""
    began = time.perf_counter()
    folder = make_folder("sd15", root, torch.device("cpu"))
    made = time.perf_counter() - began
    (root / "prompts.txt").write_text("a cat\na dog\n")
    (root / "heldout.txt").write_text("a bird\n")
    settings = [
        f"model.path={folder}",
        "model.device=cpu",
        "model.resolution=128",
        "tuning.kind=lora",
        f"prompts.source={root / 'prompts.txt'}",
        "explore.iterations=2",
        "explore.prompts_per_iteration=2",
        "explore.images_per_prompt=1",
        "explore.batch_size=2",
        "explore.sampler={name: ddim, steps: 2, eta: 1.0, guidance: 1.0}",
        "explore.negatives.source=null",
        "rewards=[{name: small_files, type: jpeg_compressibility}]",
        "offline.source=null",
        "training.steps=1",
        "training.batch_size=1",
        "training.micro_batch_size=1",
        "training.warmup_fraction=0.0",
        f"evaluation.prompts={root / 'heldout.txt'}",
        "evaluation.num_prompts=1",
        "evaluation.sampler={name: ddim, steps: 2, guidance: 1.0}",
        "evaluation.judges=[{name: large_files, type: jpeg_incompressibility}]",
        "evaluation.kl_prompts=0",
        "evaluation.vendi_prompts=0",
        "evaluation.every_iteration=false",
        "evaluation.bootstrap=100",
    ]
    recipe = root / "recipe.yaml"
    recipe.write_text("name: real_size\n")
    run_dir = root / "run"
    arguments = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "diffexpo", "run", str(recipe), "--out", str(run_dir), *arguments]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - began
    config = load_config([str(recipe)], settings, {}).config
    return {
        "what": "EXPO, 2 prompts x 2 images, 2 DDIM steps without guidance, 128 pixels, LoRA, 1 step on 1 pair",
        "folder_made_s": round(made, 1),
        "run_s": round(seconds, 1),
        **read_metrics_of(run_dir),
        "estimated_gib": round(estimate(config).total / GIB, 2),
    }


def read_metrics_of(run_dir: Path) -> dict[str, object]:
    """Seconds of each phase and the peak of the process, from the run's own lines."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    values = [(name, value) for line in lines for name, value in line.items() if value is not None]
    phases: dict[str, float] = {}
    for name, value in values:
        if name.startswith("time/"):
            phase = name.removeprefix("time/").removesuffix("_s")
            phases[phase] = round(phases.get(phase, 0.0) + float(value), 1)
    return {"phases_s": phases, "peak_gib": round(max(v for n, v in values if n == "mem/peak_gib"), 2)}


def describe_machine(device: torch.device) -> dict[str, object]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl", "sd3-medium"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--batch", type=int, default=8, help="images of one draw; pairs are half of it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "real_size.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if device.type == "cpu":
            report["cpu"] = {"machine": describe_machine(device), "expo_iteration": expo_iteration(root)}
        else:
            models = {}
            for name in options.models:
                if name not in checkpoints():
                    parser.error(f"{name} is no known architecture")
                folder, family = make_folder(name, root, device), checkpoints()[name][0]
                models[name] = {
                    mode: measure_model(family, folder, device, options.batch, mode) for mode in options.modes
                }
                shutil.rmtree(folder)
            report["accelerator"] = {
                "machine": describe_machine(device),
                "batch": options.batch,
                "models": models,
            }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
