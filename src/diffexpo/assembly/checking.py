"""What a run needs is looked for before its folder is made: models, files, sizes. No network is loaded,
nothing is downloaded and no code of a user runs, so what shows only then is still found later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from diffexpo.assembly.aliases import named_prompts, negative_prompts, resolve
from diffexpo.assembly.folders import result_path
from diffexpo.assembly.starting import check_start
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.contenders import read_contenders
from diffexpo.config.iterates import run_of_model, shape_of_model, split_iterate
from diffexpo.data.offline.formats import find_format
from diffexpo.errors import ConfigError, MissingError
from diffexpo.estimate.networks import sizes_of
from diffexpo.policies.base import find_family
from diffexpo.policies.blueprint import highest_rank
from diffexpo.policies.family import Loading
from diffexpo.policies.loading import choose_device, read_model_folder, resolve_folder
from diffexpo.training.tracking import require_tracker

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def check_inputs(config: RunConfig) -> list[str]:
    """Look for everything that a new run names.

    Returns:
        What could not be looked at, such as a model that is to be downloaded, one sentence each.
    Raises:
        MissingError: a model, file, set or run is not there. ConfigError: a size, adapter, device or start
            that cannot be. PolicyError, ImportFormatError: a file that cannot be what it is named for.
    """
    choose_device(config.model.device)
    notes = [*_model(config), *_scorers(config)]
    for source, key in (
        (config.prompts.source, "prompts.source"),
        (config.evaluation.prompts, "evaluation.prompts"),
        (config.explore.validation.prompts, "explore.validation.prompts"),
    ):
        if source is not None:
            named_prompts(source, key)
    negative_prompts(config.explore.negatives.source)
    for source, format in (
        (config.offline.source, config.offline.format),
        (config.baseline.offline_source if config.baseline.offline_dpo else None, "auto"),
    ):
        if source is not None:
            find_format(format, resolve(source))
    check_start(config)
    for tracker in config.tracking.trackers:
        require_tracker(tracker)
    read_contenders(config)
    return notes


def _model(config: RunConfig) -> Iterator[str]:
    """The base model's folder: its components, weight files, sizes, and what its adapters bind to."""
    model = config.model
    if (run := run_of_model(model.path)) is not None:
        result_path(run[0], read_resolved(run[0] / "config.yaml").config, "model.path", run[1])
    name = resolve(shape_of_model(model.path))
    if not Path(name).expanduser().exists() and HUB_ID.fullmatch(name):
        yield f"model.path = {name} is a model of the hub, which is looked at when the run starts"
        return
    folder = read_model_folder(resolve_folder(name, revision=model.revision), model.variant)
    card = find_family(folder)
    _ = Loading(card, folder, model, config.tuning, config.seed, gradient_checkpointing=False).files
    blueprint = sizes_of(config).blueprint
    if config.tuning.kind == "lora" and config.tuning.lora.rank > (highest := highest_rank(blueprint)):
        raise ConfigError(
            f"tuning.lora.rank = {config.tuning.lora.rank}: no adapted layer has a rank above {highest}; "
            "expected at most that (16 to 128 is usual)"
        )


def _scorers(config: RunConfig) -> Iterator[str]:
    """Files and folders of rewards and judges, and of models that a method needs beside the policy."""
    for label, scorers in config.scorers.items():
        for index, reward in enumerate(scorers):
            for field, what in (("path", reward.path_is if reward.path_is_local else ""), ("base", "")):
                yield from _named(getattr(reward, field), f"{reward.name!r}: {label}.{index}.{field}", what)
    branches, improvement = config.algorithm.branches, config.algorithm.improvement
    yield from _named(None if branches is None else branches.judge, "algorithm.judge")
    yield from _named(None if improvement is None else improvement.path, "algorithm.improver.path")


def _named(path: str | None, key: str, local: str = "") -> Iterator[str]:
    """Nothing if a path is there or is an address; a sentence if it may be a hub id; else a MissingError.
    `local` says what the path must name where no hub id will do."""
    if path is None or "://" in path:
        return
    name, _ = split_iterate(resolve(path))
    file = re.sub(r"\.py:\w+$", ".py", name)
    if Path(file).expanduser().exists():
        return
    if local:
        raise MissingError(f"{key} = {path}: there is no {file} in {Path.cwd()}; expected {local}")
    if not HUB_ID.fullmatch(name):
        where = "" if Path(file).expanduser().is_absolute() else f" in {Path.cwd()}"
        raise MissingError(f"{key} = {path}: there is no file {file}{where}; expected one that exists")
    yield f"{key} = {path} is no file here; if it is a name of the hub, it is looked at when the run starts"
