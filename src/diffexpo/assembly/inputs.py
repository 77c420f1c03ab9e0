"""What a run reads besides its settings must be the same when it goes on: base model, start, prompts, offline
pairs, and code and weights of scorers, by content (`data.identity`)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

import diffexpo
from diffexpo.assembly.aliases import named_prompts, resolve, resolve_model
from diffexpo.assembly.folders import has_made_nothing, result_path
from diffexpo.assembly.together import code_fingerprint
from diffexpo.bounded.texts import read_json
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.iterates import run_of_model, split_iterate
from diffexpo.config.load import leaves
from diffexpo.config.own_code import digest_of
from diffexpo.config.resuming import CHANGEABLE
from diffexpo.config.schema import ModelConfig
from diffexpo.data.identity import (
    Change,
    Identity,
    Input,
    compare,
    describe_files,
    read_identity,
    write_identity,
)
from diffexpo.data.manifests import list_manifests
from diffexpo.data.offline.formats import find_format
from diffexpo.data.offline.sources import fingerprint
from diffexpo.errors import DiffexpoError, MissingError, ResumeError
from diffexpo.files import seen
from diffexpo.policies.loading import NOT_READ, named_weights, variant_of
from diffexpo.training.distributed import World

READ = (".json", ".txt", ".model", ".safetensors")
"""Endings of files in a model's folder that decide what it is."""
MANY, LARGE = 64, 16 * 2**30
"""Files of a preference set that are named each, and bytes up to which all of it is read."""


def check_inputs_unchanged(
    config: RunConfig,
    run_dir: Path,
    world: World,
    *,
    accepts: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Record what a new run is started with; refuse to go on with anything else.

    Args:
        accepts: Go on with what differs, and record that.
        tell: Gets a sentence on each difference that is accepted, and on a record that is not there.
    Raises:
        ResumeError: settings, code or inputs are not those that the run began with, or the record is damaged.
    """
    # A start that failed before anything was made binds the next one to nothing.
    is_bound = not has_made_nothing(run_dir)
    changes: list[Change] = []
    try:
        before = (read_identity(run_dir) if is_bound else None) or Identity()
    except ResumeError as error:
        if not accepts:
            raise
        before, changes = Identity(), [Change("inputs.json", str(error), "made anew")]
    if is_bound and not before.inputs and not changes:
        tell(f"{run_dir} has no record of what it began with; it goes on with what is there now")
    now = identity_of(config, run_dir, before)
    changes += compare(before, now, CHANGEABLE)
    world.barrier()  # everybody has looked before anything is written
    if changes and not accepts:
        listed = "".join(f"\n  {change}" for change in changes)
        raise ResumeError(
            f"{run_dir} would go on with something else, so its results would be of both:{listed}\nput the "
            "old content back, start a new run, or accept this with --accept-changes (Python: "
            "accept_changes=True), which is recorded"
        )
    for change in changes:
        tell(f"accepted: {change}")
    if changes:
        now = replace(now, accepted=(*now.accepted, _accepted(run_dir, changes)))
    if world.rank == 0 and now != before:
        write_identity(run_dir, now)
    world.barrier()


def identity_of(config: RunConfig, run_dir: Path, before: Identity) -> Identity:
    """Settings, code and inputs as they are now; inputs that are gone as a whole stay as they were."""
    found = {name: entry for name, entry in _inputs(config, run_dir, before.inputs) if entry is not None}
    there = {name.partition(": ")[0] for name in found}
    gone = {name: entry for name, entry in before.inputs.items() if name.partition(": ")[0] not in there}
    code = {"diffexpo": f"{diffexpo.__version__} ({code_fingerprint()})"}
    settings = dict(leaves(config.model_dump(mode="json")))
    return Identity(settings, code, found | gone, before.accepted)


def _accepted(run_dir: Path, changes: Sequence[Change]) -> dict[str, object]:
    done = list_manifests(run_dir / "store")
    after = "{}-{}".format(*done[-1]) if done else "nothing"
    return {"at": time.strftime("%F %T"), "after": after, "changes": [vars(change) for change in changes]}


Named = Iterator[tuple[str, Input | None]]


def _inputs(config: RunConfig, run_dir: Path, before: Mapping[str, Input]) -> Named:
    """(name, what is there), the name that of a setting, and of a file where there are several."""
    for setting, source in (
        ("prompts.source", config.prompts.source),
        ("evaluation.prompts", config.evaluation.prompts),
        ("explore.validation.prompts", config.explore.validation.prompts),
        ("explore.negatives.source", config.explore.negatives.source),
    ):
        yield setting, None if source is None else _prompts(source, setting)
    branches, improvement = config.algorithm.branches, config.algorithm.improvement
    named = {
        "model.path": resolve_model(config.model.path),
        "tuning.start": config.tuning.start,
        "algorithm.judge": None if branches is None else branches.judge,
        "algorithm.improver.path": None if improvement is None else improvement.path,
    }
    for label, scorers in config.scorers.items():
        for index, card in enumerate(scorers):
            named[f"{label}.{index}.path"] = card.chosen_path if card.path_is else None
            named[f"{label}.{index}.base"] = card.base or card.default_base
    for setting, path in named.items():
        if path and "://" not in path:
            yield from _files(setting, path, config, before)
    for setting, source in (
        ("offline.source", config.offline.source),
        ("baseline.offline_source", config.baseline.offline_source),
    ):
        if source is not None:
            yield from _pairs(setting, resolve(source), config, before)
    for own in sorted(run_dir.glob("contenders/*/config.yaml")):
        name = own.relative_to(run_dir).as_posix()
        yield name, describe_files([own], before.get(name))


def _prompts(source: str, setting: str) -> Input | None:
    """The prompts themselves: remarks in a file do not matter."""
    try:
        found = named_prompts(source, setting)
    except MissingError:
        return None
    rows = [(one.id, one.text, one.category, *one.attributes.items()) for one in found]
    return Input(_absolute(source), hashlib.sha256(repr(rows).encode()).hexdigest())


def _files(setting: str, named: str, config: RunConfig, before: Mapping[str, Input]) -> Named:
    """Files of a model, a scorer or a function, each under its own name."""
    path, _, function = named.rpartition(":")
    code = Path(path).expanduser()
    if path.endswith(".py") and function.isidentifier():
        yield setting, Input(_absolute(named), digest_of(code)) if code.is_file() else None
        return
    model = config.model if setting == "model.path" else None
    root, files = _content(named, model)
    for file in files:
        name = setting if file == root else f"{setting}: {file.relative_to(root).as_posix()}"
        yield name, describe_files([file], before.get(name))


def _content(named: str, model: ModelConfig | None) -> tuple[Path, list[Path]]:
    """A path and the files behind it that decide what it is: itself, the weights of a run, the parts of a
    pipeline, or what lies in the folder of a single model, also of one that the hub gave."""
    name, iteration = split_iterate(resolve(named))
    root = Path(name).expanduser()
    if root.is_file():
        return root, [root]
    if run_of_model(name) is not None:
        try:
            return root, [result_path(root, read_resolved(root / "config.yaml").config, named, iteration)]
        except DiffexpoError:  # whoever needs it says what is missing
            return root, []
    if not root.is_dir():
        revision = None if model is None else model.revision
        try:
            root = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
            return root, []
    if (root / "model_index.json").is_file():
        return root, _pipeline_files(root, None if model is None else model.variant)
    return root, sorted(file for file in root.iterdir() if file.suffix in READ and file.is_file())


def _pipeline_files(root: Path, variant: str | None) -> list[Path]:
    """The index of a diffusers folder, and settings, tokenizers and weights of the parts that it names."""
    index = root / "model_index.json"
    try:
        named = read_json(index)
        parts = [name for name, entry in named.items() if isinstance(entry, list) and entry[0] is not None]
    except (ValueError, AttributeError, IndexError):
        return [index]
    files = [index]
    for folder in (root / part for part in parts if f"{part}/*" not in NOT_READ and (root / part).is_dir()):
        plain = [file for file in folder.iterdir() if file.suffix in READ[:-1] and file.is_file()]
        files += sorted(plain) + named_weights(folder, variant_of(folder, variant))
    return files


def _pairs(setting: str, source: str, config: RunConfig, before: Mapping[str, Input]) -> Named:
    """A preference set: its files, or all as one where they are many; of a huge one lengths and ends."""
    root = Path(source).expanduser()
    format = config.offline.format if setting == "offline.source" else "auto"
    try:
        files = sorted(find_format(format, root)[1].files(root))
    except DiffexpoError:  # the run has its own copy, or the import says what is missing
        return
    if sum(file.stat().st_size for file in files) > LARGE:
        text = json.dumps(fingerprint(files, root), sort_keys=True)
        yield setting, Input(str(root.absolute()), hashlib.sha256(text.encode()).hexdigest(), seen(files))
    elif len(files) > MANY:
        yield setting, describe_files(files, before.get(setting))
    else:
        for file in files:
            name = setting if file == root else f"{setting}: {file.relative_to(root).as_posix()}"
            yield name, describe_files([file], before.get(name))


def _absolute(source: str) -> str:
    """Where a source lies, for a person who resumes elsewhere; names of the package and the hub stay."""
    path, _, name = source.rpartition(":") if source.rpartition(":")[0].endswith(".py") else (source, "", "")
    place = Path(path).expanduser()
    return str(place.resolve()) + (f":{name}" if name else "") if place.exists() else source
