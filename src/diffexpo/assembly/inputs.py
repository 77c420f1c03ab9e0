"""What a run reads besides its settings must be the same when it goes on: prompts, negative prompts, base
weights and own code are remembered by their hashes, in `inputs.json` of the run's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from diffexpo.assembly.aliases import named_prompts
from diffexpo.assembly.folders import has_made_nothing
from diffexpo.config import RunConfig
from diffexpo.config.own_code import digest_of
from diffexpo.errors import ResumeError
from diffexpo.files import write_json
from diffexpo.training.distributed import World

FILE = "inputs.json"


def check_inputs_unchanged(config: RunConfig, run_dir: Path, fingerprint: str, world: World) -> None:
    """Remember what a new run reads; refuse to go on with other inputs, or with those of another machine's
    edit, naming the first that differs.

    Args:
        fingerprint: That of the base model's weight files.
    Raises:
        ResumeError: prompts, code or weights are not those that the run began with.
    """
    found = {"model.path": (config.model.path, fingerprint), **dict(_inputs(config))}
    path = run_dir / FILE
    # A start that failed before anything was made binds the next one to nothing.
    is_bound = path.is_file() and not has_made_nothing(run_dir)
    known = json.loads(path.read_text(encoding="utf-8")) if is_bound else {}
    world.barrier()  # everybody has looked before anything is written
    for setting, (source, digest) in found.items():
        before = known.get(setting)
        if before is not None and before["sha256"] != digest:
            raise ResumeError(
                f"{setting} = {source}: {before['file']} is not what this run began with, so its results "
                "would be of both; put the old content back, or start a new run"
            )
    if world.rank == 0 and known.keys() != found.keys():
        written = {
            setting: {"file": _absolute(source), "sha256": digest}
            for setting, (source, digest) in found.items()
        }
        write_json(path, written | known)
    world.barrier()


def _inputs(config: RunConfig) -> Iterator[tuple[str, tuple[str, str]]]:
    """(setting, (source, hash)) of prompts, and of the files of own functions."""
    for setting, source in (
        ("prompts.source", config.prompts.source),
        ("evaluation.prompts", config.evaluation.prompts),
        ("explore.validation.prompts", config.explore.validation.prompts),
        ("explore.negatives.source", config.explore.negatives.source),
    ):
        if source is not None:
            rows = [
                (one.id, one.text, one.category, *one.attributes.items())
                for one in named_prompts(source, setting)
            ]
            yield setting, (source, hashlib.sha256(repr(rows).encode()).hexdigest())
    for label, scorers in config.scorers.items():
        for index, card in enumerate(scorers):
            yield from _code(f"{label}.{index}.path", card.path)


def _code(setting: str, path: str | None) -> Iterator[tuple[str, tuple[str, str]]]:
    """The hash of `file.py:function`; nothing for other paths."""
    name, _, function = (path or "").rpartition(":")
    file = Path(name).expanduser()
    if path is not None and name.endswith(".py") and function.isidentifier() and file.is_file():
        yield setting, (path, digest_of(file))


def _absolute(source: str) -> str:
    """Where a source lies, for a person who resumes elsewhere; names of the package and the hub stay."""
    path, _, name = source.rpartition(":") if source.rpartition(":")[0].endswith(".py") else (source, "", "")
    place = Path(path).expanduser()
    return str(place.resolve()) + (f":{name}" if name else "") if place.exists() else source
