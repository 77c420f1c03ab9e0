"""The run folder: what was asked for, on which machine, in which state."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import diffexpo
from diffexpo.config import RunConfig, config_to_yaml, read_resolved
from diffexpo.config.load import leaves
from diffexpo.config.resuming import CHANGEABLE, differences
from diffexpo.errors import ConfigError, MissingError, ResumeError
from diffexpo.files import write_json, write_text
from diffexpo.online.keeping import kept_iterate, last_iteration
from diffexpo.training.checkpoint import read_tensors
from diffexpo.training.distributed import World


def prepare_folder(
    config: RunConfig, run_dir: Path, sources: Mapping[str, str], resume: bool, world: World
) -> None:
    """Write what was asked for, or check that the folder was made for the same (else a ConfigError); a
    resumed run may differ in what leaves its results alone (a ResumeError if there is none)."""
    path = run_dir / "config.yaml"
    if path.exists():
        changed = differences(read_resolved(path).config, config)
        if changed and not (resume and set(changed) <= set(CHANGEABLE)):
            advice = "resume it with --resume or choose another --name"
            raise ConfigError(f"{run_dir} holds a run with other settings; {advice}")
    elif resume:
        advice = "start one with `diffexpo run RECIPE`"
        raise ResumeError(f"{path} does not exist: {run_dir} is no run folder; {advice}")
    if world.rank == 0 and not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "env.json", environment())
        origins = "".join(f"{key}: {origin}\n" for key, origin in sorted(sources.items()))
        write_text(run_dir / "config.source.yaml", origins)
        write_text(path, config_to_yaml(config))
    world.barrier()


def keep_changes(config: RunConfig, run_dir: Path, sources: Mapping[str, str]) -> list[str]:
    """Write what a resumed run goes on with, under the folder's lock; returns the settings that are new."""
    path, origins = run_dir / "config.yaml", run_dir / "config.source.yaml"
    changed = differences(read_resolved(path).config, config)
    if changed:
        lines = dict(line.partition(": ")[::2] for line in origins.read_text(encoding="utf-8").splitlines())
        lines |= {name: f"{sources.get(name, 'unknown')}, on resuming" for name in changed}
        write_text(origins, "".join(f"{name}: {origin}\n" for name, origin in sorted(lines.items())))
        write_text(path, config_to_yaml(config))
    values = dict(leaves(config.model_dump(mode="json")))
    return [f"{name}={values[name]}" for name in changed]


def result_of(run_dir: Path, config: RunConfig, what: str) -> Mapping[str, Tensor]:
    """The weights that are the result of a finished run; a MissingError of one that is not trained to its end
    begins with `what`, who asks for them."""
    store = run_dir / "store"
    path = iterate_path(run_dir, last_iteration(config, store))
    if not path.is_file():
        advice = f"finish it with `diffexpo run --resume {run_dir}`"
        raise MissingError(f"{what}: {path} does not exist, so {run_dir} is not trained to its end; {advice}")
    return read_tensors(iterate_path(run_dir, kept_iterate(config, store)))


def iterate_path(run_dir: Path, iteration: int) -> Path:
    """The file of an iterate's weights."""
    return run_dir / "checkpoints" / f"weights-{iteration:04d}.safetensors"


def environment() -> dict[str, object]:
    """What a result may depend on: versions, machine, threads, command."""
    packages = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")
    return {
        "diffexpo": diffexpo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": _accelerator(),
        "command": " ".join(["diffexpo", *sys.argv[1:]]),
    }


def _accelerator() -> str:
    """The accelerator's name, of CUDA the card's; `none` without one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "none" if found is None else found.type


def set_status(run_dir: Path, state: str, world: World) -> None:
    """status.json: what `diffexpo run --resume` and the report look at."""
    if world.rank == 0:
        write_json(run_dir / "status.json", {"state": state, "pid": os.getpid(), "host": platform.node()})
