"""The run folder: what was asked for, on which machine, in which state."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import diffexpo
from diffexpo.bounded.texts import read_json
from diffexpo.config import RunConfig, config_to_yaml, read_resolved
from diffexpo.config.load import leaves
from diffexpo.config.resuming import CHANGEABLE, differences
from diffexpo.errors import ConfigError, MissingError, ResumeError
from diffexpo.files import write_json, write_text
from diffexpo.online.keeping import kept_iterate, last_iteration
from diffexpo.training.distributed import World


def require_run(run_dir: Path, resume: bool) -> None:
    """A ResumeError where a run is to go on that is not there."""
    if resume and not (run_dir / "config.yaml").exists():
        advice = "start one with `diffexpo run RECIPE`"
        raise ResumeError(f"{run_dir / 'config.yaml'} does not exist: {run_dir} is no run folder; {advice}")


def prepare_folder(
    config: RunConfig, run_dir: Path, sources: Mapping[str, str], resume: bool, world: World
) -> None:
    """Write what was asked for, or check that the folder was made for the same (else a ConfigError that names
    the settings which differ). A resumed run may differ in what leaves its results alone; a folder in which a
    start failed before anything was made takes the settings of the next one."""
    path = run_dir / "config.yaml"
    is_new = not path.exists()
    if not is_new:
        changed = differences(read_resolved(path).config, config)
        is_new = bool(changed) and not resume and has_made_nothing(run_dir)
        if changed and not is_new and not (resume and set(changed) <= set(CHANGEABLE)):
            advice = "resume it with --resume or choose another --name"
            told = describe_differences(read_resolved(path).config, config, changed)
            raise ConfigError(f"{run_dir} holds a run with other settings ({told}); {advice}")
    world.barrier()  # everybody has looked before anything is written
    if world.rank == 0 and is_new:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "env.json", environment())
        origins = "".join(f"{key}: {origin}\n" for key, origin in sorted(sources.items()))
        write_text(run_dir / "config.source.yaml", origins)
        write_text(path, config_to_yaml(config))
    world.barrier()


def has_made_nothing(run_dir: Path) -> bool:
    """Whether a folder holds settings and messages only: nothing imported, drawn, trained or evaluated."""
    made = ("store/*.*", "store/manifests/*", "eval/*/*", "checkpoints/*", "contenders/*", "baseline/*")
    return not any(next(run_dir.glob(pattern), None) for pattern in made)


def describe_differences(before: RunConfig, after: RunConfig, changed: Sequence[str], most: int = 5) -> str:
    """Settings that differ, with both values: "seed 0, now 1"; the first few of many."""
    old, new = (dict(leaves(config.model_dump(mode="json"))) for config in (before, after))
    shown = [f"{name} {old.get(name, 'unset')}, now {new.get(name, 'unset')}" for name in changed[:most]]
    more = len(changed) - most
    return "; ".join([*shown, *([f"and {more} more"] if more > 0 else [])])


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


def result_path(run_dir: Path, config: RunConfig, what: str, iteration: int | None = None) -> Path:
    """The file of the weights that are the result of a finished run, or of one of its iterates.

    Raises:
        MissingError: the run is not trained to its end, or has no such iterate; it begins with `what`, who
            asks for them.
    """
    store = run_dir / "store"
    if iteration is not None:
        path = iterate_path(run_dir, iteration)
        if not path.is_file():
            there = ", ".join(str(number) for number in trained_iterates(run_dir)) or "none"
            raise MissingError(f"{what}: {run_dir} has no iterate {iteration}; it has trained {there}")
        return path
    path = iterate_path(run_dir, last_iteration(config, store))
    if not path.is_file():
        advice = f"finish it with `diffexpo run --resume {run_dir}`"
        raise MissingError(f"{what}: {path} does not exist, so {run_dir} is not trained to its end; {advice}")
    return iterate_path(run_dir, kept_iterate(config, store))


def trained_iterates(run_dir: Path) -> list[int]:
    """Numbers of the iterates whose weights a run has kept, without 0, in order."""
    files = (run_dir / "checkpoints").glob("weights-*.safetensors")
    numbers = sorted(int(file.stem.removeprefix("weights-")) for file in files)
    return [number for number in numbers if number > 0]


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


def read_status(run_dir: Path) -> str:
    """`state` of status.json (running, interrupted, failed, finished); "new" where there is none to read."""
    try:
        return str(read_json(run_dir / "status.json")["state"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "new"
