"""What a run was started with, in `inputs.json` of its folder: settings, code and every input by content.

    {"format": 2, "sha256": of the rest, "code": ..., "settings": ..., "inputs": ..., "accepted": ...}

A run that goes on is compared with it, so that its results are of one thing. What differs and was accepted is
kept, with the time and the stage it came after. Imports without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffexpo.bounded.texts import parse_json, read_json
from diffexpo.errors import ResumeError
from diffexpo.files import checksum_of, seen, sha256_once, write_json

FILE = "inputs.json"
FORMAT = 2
ALWAYS_READ = 1 << 20
"""Bytes up to which an input is read at each start; of larger ones the file system is asked first."""


@dataclass(frozen=True)
class Input:
    """One input: where it lay, its SHA-256, and what the file system told of it (`files.seen`)."""

    file: str
    sha256: str
    seen: str = ""


@dataclass(frozen=True)
class Change:
    """One thing that is not what a run began with; `before` and `now` are values, or the heads of hashes."""

    what: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.what} is not what this run began with ({self.before}, now {self.now})"


@dataclass(frozen=True)
class Identity:
    """Settings by dotted path, code by what identifies it, inputs by setting and file; `accepted` are the
    changes that the run went on with."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    accepted: tuple[Mapping[str, Any], ...] = ()


def describe_files(files: Sequence[Path], before: Input | None = None) -> Input:
    """Files as one input, several under their common folder. Nothing is read where they are large and the
    file system tells of no change since `before`."""
    told = seen(files)
    home = files[0] if len(files) == 1 else Path(files[0]).parent
    if before is not None and before.seen == told and sum(map(_size, files)) > ALWAYS_READ:
        return replace(before, file=str(home.absolute()))
    digests = [sha256_once(path) for path in files]
    if len(files) == 1:
        return Input(str(home.absolute()), digests[0], told)
    lines = "".join(f"{path.name} {digest}\n" for path, digest in zip(files, digests, strict=True))
    return Input(str(home.absolute()), hashlib.sha256(lines.encode()).hexdigest(), told)


def compare(before: Identity, now: Identity, free: Sequence[str] = ()) -> list[Change]:
    """Everything in which a run that goes on differs from what it began with, settings first.

    Args:
        free: Settings that may change.
    Returns:
        The changes; none for a part that `before` does not have (older runs). An input of which nothing is
        left is none either: whoever reads it says so, or the run has its own copy.
    """
    return [*_settings(before, now, free), *_code(before, now), *_inputs(before, now)]


def _settings(before: Identity, now: Identity, free: Sequence[str]) -> Iterator[Change]:
    unset = "unset"
    if before.settings:
        for name in sorted(before.settings.keys() | now.settings.keys()):
            old, new = before.settings.get(name, unset), now.settings.get(name, unset)
            if old != new and name not in free:
                yield Change(f"the setting {name}", f"{old}", f"{new}")


def _code(before: Identity, now: Identity) -> Iterator[Change]:
    for name, old in before.code.items():
        if now.code.get(name) != old:
            yield Change(f"the code of {name}", old, str(now.code.get(name)))


def _inputs(before: Identity, now: Identity) -> Iterator[Change]:
    there = {_setting(name) for name in now.inputs}
    known = {_setting(name) for name in before.inputs}
    for name in sorted(before.inputs.keys() | now.inputs.keys()):
        old, new = before.inputs.get(name), now.inputs.get(name)
        setting = _setting(name)
        found = new or old
        if found is None or setting not in there or setting not in known:
            continue
        # The cache of the hub gets more files of a model whenever somebody asks for them.
        is_fetched = old is None and "snapshots" in Path(found.file).parts
        if not is_fetched and (old is None or new is None or old.sha256 != new.sha256):
            yield Change(f"{setting} = {found.file}", _head(old, "not there"), _head(new, "gone"))


def _setting(name: str) -> str:
    """The setting of an input's name: "model.path" of "model.path: unet/config.json"."""
    return name.partition(": ")[0]


def _head(entry: Input | None, absent: str) -> str:
    return absent if entry is None else f"sha256 {entry.sha256[:12]}"


def _size(path: Path) -> int:
    return path.stat().st_size


def read_identity(run_dir: Path) -> Identity | None:
    """What a run was started with; None where nothing is recorded.

    Raises:
        ResumeError: the file is damaged, or a later version's.
    """
    path = run_dir / FILE
    if not path.is_file():
        return None
    try:
        body = read_json(path)
        if "format" not in body:  # of an early version, without settings and code
            inputs = {name: Input(**entry) for name, entry in body.items() if name != "model.path"}
            return Identity(inputs=inputs)
        if body["format"] != FORMAT:
            raise ResumeError(
                f"{path} has format {body['format']}, this version reads {FORMAT}; use the version of "
                "diffexpo that wrote it"
            )
        if body.pop("sha256") != checksum_of(body):
            raise ValueError("its checksum does not match")
        inputs = {name: Input(**entry) for name, entry in body["inputs"].items()}
        return Identity(body["settings"], body["code"], inputs, tuple(body["accepted"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(
            f"{path} is damaged ({error}), so nobody can say whether settings and inputs are still those "
            "that the run began with; restore the file, or trust them as they are with --accept-changes"
        ) from error


def accepted_changes(run_dir: Path) -> list[str]:
    """One sentence on each change that a run went on with, and on a record that cannot be read."""
    try:
        known = read_identity(run_dir) or Identity()
    except ResumeError as error:
        return [str(error)]
    return [
        f"After {one['after']} the run went on with a change that was accepted: {Change(**change)}."
        for one in known.accepted
        for change in one["changes"]
    ]


def write_identity(run_dir: Path, identity: Identity) -> None:
    """Write the record whole, with its checksum."""
    body = {"format": FORMAT, **asdict(identity)}
    write_json(run_dir / FILE, {"sha256": checksum_of(parse_json(json.dumps(body))), **body})
