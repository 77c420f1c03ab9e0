"""`diffexpo verify RUN`: whether every file of a run is what was written, and what can be made anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffexpo.assembly.folders import iterate_path, read_status
from diffexpo.assembly.inputs import identity_of
from diffexpo.assembly.verifying import Finding
from diffexpo.config import RunConfig, config_to_yaml, read_resolved
from diffexpo.config.resuming import CHANGEABLE
from diffexpo.data.audit import find_problems
from diffexpo.data.identity import compare, read_identity
from diffexpo.data.manifests import list_manifests, read_manifests
from diffexpo.errors import ConfigError, DiffexpoError, MissingError, ResumeError, StoreError
from diffexpo.evaluation.records import load_run, load_suite
from diffexpo.files import SUMS, changed_files, write_text
from diffexpo.policies.states import fingerprint_state
from diffexpo.training.checkpoint import read_checkpoint, read_tensors
from diffexpo.training.metrics import sound_metrics

LANES = ("", "baseline", "contenders/*")


def verify_run(run_dir: Path) -> list[Finding]:
    """Look at everything that a run folder holds; nothing is changed.

    Returns:
        A line for each part: ok, a note, or a failure that says what is damaged and how it is made again.
    """
    parts = (_settings, _store, _weights, _checkpoints, _suites, _metrics, _end)
    return [finding for part in parts for finding in part(run_dir)]


def restore_settings(run_dir: Path) -> Path:
    """Write config.yaml again as the run's record has it; a ResumeError where that has none."""
    known = read_identity(run_dir)
    if known is None or not known.settings:
        raise ResumeError(f"{run_dir} has no record of its settings; restore config.yaml from a copy")
    path = run_dir / "config.yaml"
    write_text(path, config_to_yaml(RunConfig.model_validate(_nested(known.settings))))
    return path


def _nested(settings: object) -> object:
    """Values by dotted path as groups and lists."""
    groups: dict[str, object] = {}
    for path, value in settings.items() if isinstance(settings, dict) else ():
        *above, last = path.split(".")
        group = groups
        for key in above:
            group = group.setdefault(key, {})  # type: ignore[assignment]
        group[last] = value
    return _lists(groups)


def _lists(value: object) -> object:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(one) for key, one in value.items()}
    is_list = bool(inner) and all(key.isdecimal() for key in inner)
    return [inner[key] for key in sorted(inner, key=int)] if is_list else inner


def _settings(run_dir: Path) -> Iterator[Finding]:
    """config.yaml and the record, and whether a resumed run would go on with the same."""
    restores = "write it again with `diffexpo verify RUN --restore-settings`"
    try:
        known = read_identity(run_dir)
    except ResumeError as error:
        yield Finding("fail", str(error))
        return
    try:
        config = read_resolved(run_dir / "config.yaml").config
    except (ConfigError, MissingError) as error:
        yield Finding("fail", f"config.yaml: {error}; {restores}")
        return
    if known is None:
        yield Finding("note", "there is no record of settings and inputs: an early version began this run")
        return
    changes = compare(known, identity_of(config, run_dir, known), CHANGEABLE)
    is_over = read_status(run_dir) == "finished"
    for change in changes:
        if is_over and change.what.startswith("the code of"):
            yield Finding("note", f"{change}; the run is finished, so nothing more is made with it")
            continue
        is_setting = change.what.startswith("the setting")
        advice = restores if is_setting else "put it back before the run goes on, or use --accept-changes"
        yield Finding("fail", f"{change}; {advice}")
    if not changes:
        yield Finding("ok", f"settings, code and {len(known.inputs)} inputs are what the run began with")
    for one in known.accepted:
        listed = "; ".join(change["what"] for change in one["changes"])
        yield Finding("note", f"accepted after {one['after']}, on {one['at']}: {listed}")


def _store(run_dir: Path) -> Iterator[Finding]:
    for root in (store for lane in LANES for store in sorted(run_dir.glob(f"{lane}/store".lstrip("/")))):
        problems = find_problems(root)
        yield from (Finding("fail", f"{root.relative_to(run_dir)}: {problem}") for problem in problems)
        if not problems:
            stages = len(list_manifests(root))
            yield Finding("ok", f"{root.relative_to(run_dir)}: what {stages} complete stages name is whole")


def _weights(run_dir: Path) -> Iterator[Finding]:
    """Iterates against their manifests."""
    try:
        trained = read_manifests(run_dir / "store", "train")
    except StoreError:
        return  # said of the store
    sound = 0
    for iteration, payload in trained.items():
        path = iterate_path(run_dir, iteration)
        advice = (
            f"delete store/manifests/train-{iteration:04d}.json and resume: the iteration is trained again"
        )
        try:
            if not path.is_file():
                raise MissingError(f"{path} is missing")
            if fingerprint_state(read_tensors(path)) != payload["weights"]:
                raise ResumeError(f"{path} does not hold the weights that were trained")
            sound += 1
        except (DiffexpoError, KeyError) as error:
            yield Finding("fail", f"{error}; {advice}")
    if trained and sound == len(trained):
        yield Finding("ok", f"weights of {sound} iterates are those that were trained")
    for path in sorted((run_dir / "checkpoints").glob("*.safetensors")):
        if not path.name.startswith("weights-") or path == iterate_path(run_dir, 0):
            try:
                read_tensors(path)
            except ResumeError as error:
                yield Finding("fail", str(error))


def _checkpoints(run_dir: Path) -> Iterator[Finding]:
    for path in sorted((run_dir / "checkpoints").glob("iteration-*/checkpoint-*")):
        if path.name.removeprefix("checkpoint-").isdecimal():
            try:
                read_checkpoint(path)
                yield Finding("ok", f"{path.relative_to(run_dir)} is whole")
            except ResumeError as error:
                yield Finding("fail", f"{error}; resume: training goes on from an earlier one")


def _suites(run_dir: Path) -> Iterator[Finding]:
    folders = [*run_dir.glob("eval/*/suite.json"), *run_dir.glob("contenders/eval/*/suite.json")]
    for folder in sorted(file.parent for file in folders):
        try:
            images = len(load_suite(folder).images)
            yield Finding("ok", f"{folder.relative_to(run_dir)}: {images} images and their scores are whole")
        except DiffexpoError as error:
            yield Finding("fail", str(error))


def _metrics(run_dir: Path) -> Iterator[Finding]:
    found = (file for lane in LANES for file in run_dir.glob(f"{lane}/metrics.jsonl*".lstrip("/")))
    for path in sorted({file.with_name("metrics.jsonl") for file in found}):
        rows, problems = sound_metrics(path)
        yield from (Finding("fail", problem) for problem in problems)
        if not problems:
            yield Finding("ok", f"{path.relative_to(run_dir)}: {len(rows)} lines are whole")


def _end(run_dir: Path) -> Iterator[Finding]:
    """What a finished run must have, and the files that say what it is."""
    try:
        state = load_run(run_dir, with_images=False).status.get("state", "unknown")
    except DiffexpoError as error:
        yield Finding("fail", str(error))
        return
    if state != "finished":
        yield Finding("note", f"the run is {state}; `diffexpo run --resume` goes on")
        return
    for name, again in (("report.html", "`diffexpo report`"), ("export", "`diffexpo export`")):
        path = run_dir / name
        is_there = path.is_file() or next(path.glob("*"), None) is not None
        told = "is there" if is_there else f"is missing; write it again with {again} {run_dir}"
        yield Finding("ok" if is_there else "fail", f"{name} {told}")
    if (run_dir / SUMS).is_file():
        for name, what in changed_files(run_dir).items():
            advice = f"restore it, or write the report again with `diffexpo report {run_dir}`"
            yield Finding("fail", f"{name} {what} since the report was written; {advice}")
    for sums in sorted((run_dir / "export").rglob(SUMS)):
        for name, what in changed_files(sums.parent).items():
            path, again = sums.parent / name, f"write it again with `diffexpo export {run_dir}`"
            yield Finding("fail", f"{path.relative_to(run_dir)} {what} since it was exported; {again}")
