"""What `diffexpo evaluate` names, as policies: what it is to the bit, what trained it, how it is opened."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffexpo.assembly.aliases import resolve
from diffexpo.assembly.folders import iterate_path, result_path
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.contenders import START
from diffexpo.config.entries import BASELINE, Entry
from diffexpo.config.iterates import split_iterate
from diffexpo.config.rewards import RewardCard
from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.data.drawn_images import image_files
from diffexpo.errors import ConfigError, MissingError
from diffexpo.evaluation.records import CONTENDERS
from diffexpo.files import sha256_of
from diffexpo.policies.base import find_family, load_policy
from diffexpo.policies.family import FamilyPolicy, Loading
from diffexpo.policies.loading import fingerprint_files, read_model_folder, resolve_folder
from diffexpo.policies.lora_files import require_lora
from diffexpo.policies.merging import merge_lora
from diffexpo.training.checkpoint import read_tensors
from diffexpo.training.distributed import World

TRAINED = ("run", BASELINE)
"""Kinds of entries that have a run's settings."""
BARE = TuningConfig(kind="lora", lora=LoraConfig(rank=1))
"""Adapters that are never used: the base itself runs, without a second copy of it in memory."""


def identity(entry: Entry, dtype: str) -> str:
    """What an entry is: a hash of the weights (or of the images) that it draws with, and their precision.

    Raises what loading raises, before anything is loaded: MissingError for files that are not there,
    PolicyError for damaged ones.
    """
    if entry.kind == "images":
        root = Path(entry.path).expanduser()
        return _hash(*(f"{path.relative_to(root)} {sha256_of(path)}" for path in image_files(root)))
    model = _model(entry, dtype)
    folder = read_model_folder(resolve_folder(resolve(model.path), revision=model.revision), model.variant)
    loading = Loading(find_family(folder), folder, model, BARE, 0, gradient_checkpointing=False)
    parts = [fingerprint_files(loading.files, folder.path), model.dtype]
    if entry.kind in TRAINED:
        config = _config(entry)
        parts += [sha256_of(_weights(entry, config)), str(config.tuning.lora.alpha), config.tuning.kind]
    if entry.lora is not None:
        parts += [sha256_of(require_lora(entry.lora)), repr(entry.scale)]
    return _hash(*parts)


@contextmanager
def opened(
    entry: Entry, dtype: str, device: str, folder: Path, world: World
) -> Iterator[tuple[FamilyPolicy, str]]:
    """The policy of an entry and the version of its weights to draw with; a merged LoRA lies in the entry's
    own folder as long as the block runs."""
    model = _model(entry, dtype).model_copy(update={"device": device})
    if entry.kind in TRAINED:
        config = _config(entry)
        policy = load_policy(model, config.tuning, folder_or_id=resolve(model.path), seed=config.seed)
        policy.weights.load("current", read_tensors(_weights(entry, config)))
        yield policy, "current"
        return
    path = resolve(model.path)
    merged = folder / "merged.tmp"
    try:
        if entry.lora is not None:
            if world.rank == 0:
                shutil.rmtree(merged, ignore_errors=True)
                base = read_model_folder(resolve_folder(path), model.variant)
                merge_lora(base, require_lora(entry.lora), entry.scale, model.dtype, merged)
            world.barrier()
            path = str(merged)
        yield load_policy(model, BARE, folder_or_id=path, seed=0), "base"
    finally:
        if entry.lora is not None and world.rank == 0:
            shutil.rmtree(merged, ignore_errors=True)


def check_lora(entry: Entry, dtype: str) -> None:
    """Raise a PolicyError for a LoRA that does not fit its base, before other models are drawn."""
    assert entry.lora is not None
    model = _model(entry, dtype)
    base = read_model_folder(resolve_folder(resolve(model.path)), model.variant)
    merge_lora(base, require_lora(entry.lora), entry.scale, model.dtype, None)


def refuse_trained(entry: Entry, judges: tuple[RewardCard, ...], shows: bool) -> list[str]:
    """Names of the judges that an entry was trained by; a ConfigError unless they are only to be shown."""
    trained = []
    for reward in _rewards(entry):
        for judge in judges:
            if _is_same(judge, reward):
                trained.append(judge.name)
                if not shows:
                    raise ConfigError(
                        f"judge {judge.name!r} ({judge.type}) trained {entry.label}: it is the run's reward "
                        f"{reward.name!r}, so it cannot be its held-out judge; choose another judge "
                        "(--set 'judges=[]' --judge TYPE:PATH), or show its scores, which decide nothing: "
                        "--show-trained"
                    )
    return sorted(set(trained))


def _is_same(judge: RewardCard, reward: RewardCard) -> bool:
    """One scorer, or two readings of one network."""
    mine, theirs = judge.chosen_path, reward.chosen_path
    if mine is None or theirs is None:
        return judge.type == reward.type
    return resolve(mine) == resolve(theirs) and judge.identity[2:] == reward.identity[2:]


def _rewards(entry: Entry) -> list[RewardCard]:
    """Rewards that trained an entry, also those of the run that its run started from, or that exported it.
    Offline DPO learned from given pairs alone, and has those of its start."""
    found: list[RewardCard] = []
    folder: Path | None = Path(entry.path).expanduser() if entry.kind in TRAINED else _run_around(entry)
    seen: set[Path] = set()
    while folder is not None and (folder / "config.yaml").is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        config = read_resolved(folder / "config.yaml").config
        if entry.kind != BASELINE or len(seen) > 1:
            found += [reward for reward in config.rewards if reward.role == "train"]
        folder = None if config.tuning.start is None else _start(folder, config.tuning.start)
    return found


def _start(folder: Path, start: str) -> Path:
    """The folder of what a run's training started from."""
    if start.startswith(START):
        return folder / CONTENDERS / start.removeprefix(START)
    return Path(split_iterate(start)[0]).expanduser()


def _run_around(entry: Entry) -> Path | None:
    """The run whose export an entry, or its LoRA, is."""
    named = Path(entry.lora or entry.path).expanduser()
    around = named.resolve().parents if named.exists() else ()
    return next((folder for folder in around if (folder / "config.yaml").is_file()), None)


def _config(entry: Entry) -> RunConfig:
    return read_resolved(Path(entry.path) / "config.yaml").config


def _weights(entry: Entry, config: RunConfig) -> Path:
    folder = Path(entry.path)
    if entry.kind == BASELINE:
        path = iterate_path(folder / BASELINE, 1)
        if not path.is_file():
            raise MissingError(
                f"model {entry.label!r}: {path} does not exist; a run trains its baseline at its end, with "
                "baseline.offline_dpo=true"
            )
        return path
    return result_path(folder, config, f"model {entry.label!r}", entry.iteration)


def _model(entry: Entry, dtype: str) -> ModelConfig:
    """Settings of the base model; a run's iterates have the run's own."""
    if entry.kind in TRAINED:
        return _config(entry).model
    return ModelConfig.model_validate({"path": entry.path, "dtype": dtype})


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
