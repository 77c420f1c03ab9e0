"""A run's stored images judged anew: another run with the same images, other rewards and other pairs, without
drawing anything."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from diffexpo.assembly.folders import prepare_folder, set_status
from diffexpo.assembly.objects import build_loop
from diffexpo.config import LoadedConfig, load_config, read_resolved
from diffexpo.config.resuming import differences
from diffexpo.data.manifests import manifest_files, manifest_path
from diffexpo.data.rows import Sample
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, MissingError
from diffexpo.online.loop import Console, Loop
from diffexpo.online.stages.collect import collection_metrics
from diffexpo.online.stages.pair import pair
from diffexpo.training.distributed import World
from diffexpo.training.lock import RunLock
from diffexpo.training.signals import StopSignal
from diffexpo.types import Drawn

JUDGING = ("rewards", "mixture", "pairing", "name")
"""Groups of settings that judging alone depends on."""
OFFLINE = ("offline", 0)
UNFINISHED = ".rescoring"
"""Where the new run lies until it is whole: one that is resumed before would draw what is not judged yet."""


def rescore(run_dir: Path, target: Path, overrides: Sequence[str], console: Console) -> dict[str, int]:
    """Judge what a run has stored by other rewards and pair it, in a folder of its own.

    The new run has the old one's settings but those of judging, its offline pairs and its images, so that
    `diffexpo run --resume` trains on the new pairs. Killed, the same command continues.

    Args:
        run_dir: A run with a complete collection. target: Folder of the new run.
        overrides: `--set` strings; of `JUDGING` only.
    Returns:
        Numbers of images and of pairs.
    Raises:
        ConfigError: other settings, people as judges, or a method whose pairs no reward makes.
        MissingError: nothing is collected yet.
    """
    loaded = _settings(run_dir, overrides)
    config, source, world = loaded.config, Store(run_dir / "store", create=False), World()
    iterations = [iteration for stage, iteration in source.completed() if stage == "collect"]
    if not iterations:
        raise MissingError(f"{run_dir} has no complete collection, so there is nothing to judge anew")
    is_done = (target / "config.yaml").is_file()
    folder = target if is_done else target.parent / UNFINISHED / target.name
    prepare_folder(config, folder, loaded.sources, False, world)
    if not is_done:
        with RunLock(folder), StopSignal() as stop:
            console.attach_log(folder / "log.txt")
            _copy_stage(source, Store(folder / "store"), *OFFLINE)
            loop = build_loop(config, folder, console, stop, world)
            for iteration in iterations:
                _judge(loop, source, iteration)
                pair(loop, iteration)
            set_status(folder, "stopped", world)
        folder.rename(target)
        console.attach_log(target / "log.txt")
    store = Store(target / "store", create=False)
    images = sum(len(store.collected(iteration)) for iteration in iterations)
    return {"images": images, "pairs": sum(len(store.pairs(iteration)) for iteration in iterations)}


def _settings(run_dir: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The run's settings with those of judging changed; anything else is refused."""
    path = run_dir / "config.yaml"
    loaded = load_config([path], overrides, {})
    changed = differences(read_resolved(path).config, loaded.config)
    if wrong := [name for name in changed if name.split(".")[0] not in JUDGING]:
        raise ConfigError(
            f"--set {wrong[0]}: stored images do not depend on how they are judged alone; expected settings "
            f"of {', '.join(JUDGING[:-1])}"
        )
    card = loaded.config.algorithm
    if card.pairing != "ranked" or card.draws_first:
        raise ConfigError(f"{run_dir} is a run of {card.title}: rewards do not pair its images")
    if any(reward.asks_people for reward in loaded.config.rewards):
        raise ConfigError("rewards: people judge when the run asks them; expected rewards that score images")
    return loaded


def _judge(loop: Loop, source: Store, iteration: int) -> None:
    """Store an iteration's images with the scores of the new rewards, unit by unit."""
    store = loop.store
    if store.is_complete("collect", iteration):
        return
    store.discard_incomplete("collect", iteration)
    rows = sorted(source.collected(iteration), key=lambda sample: sample.unit)
    with loop.console.phase(f"judge iteration {iteration} anew", len(rows), "images") as bar:
        for unit, same in groupby(rows, key=lambda sample: sample.unit):
            samples = list(same)
            if not store.unit_done(iteration, unit):
                _judge_unit(loop, source, iteration, unit, samples)
            bar.advance(len(samples))
            loop.check_signals()
    store.write_manifest("collect", iteration, {})
    ranked = next((reward.name for reward in loop.config.rewards if reward.role == "train"), None)
    told = collection_metrics(store.collected(iteration), ranked) | {"cost/network_evaluations": 0.0}
    loop.metrics.write_once(iteration, "collect", told)


def _judge_unit(loop: Loop, source: Store, iteration: int, unit: int, samples: Sequence[Sample]) -> None:
    stretches = source.stretches([sample.sample_id for sample in samples])
    scores: dict[str, list[float]] = {}
    start = 0
    for stretch in stretches:  # images of one size
        drawn = torch.from_numpy(stretch)
        with torch.no_grad():
            images = loop.policy.decode_latents(drawn)
        texts = [sample.prompt for sample in samples[start : start + len(stretch)]]
        for name, values in loop.score(Drawn(drawn, images), texts).items():
            scores.setdefault(name, []).extend(map(float, values))
        start += len(stretch)
    rows = [
        replace(sample, latent_file="", rewards={name: values[index] for name, values in scores.items()})
        for index, sample in enumerate(samples)
    ]
    loop.store.append_unit(iteration, 0, unit, rows, [latent for stretch in stretches for latent in stretch])


def _copy_stage(source: Store, target: Store, stage: str, iteration: int) -> None:
    """A complete stage's files as they are, its manifest last; nothing where there is none."""
    if not source.is_complete(stage, iteration) or target.is_complete(stage, iteration):
        return
    for name in manifest_files(source.root, stage, iteration):
        shutil.copyfile(source.root / name, target.root / name)
    shutil.copyfile(*(manifest_path(store.root, stage, iteration) for store in (source, target)))
