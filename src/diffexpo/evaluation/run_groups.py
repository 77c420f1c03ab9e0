"""The runs of a comparison as they are read: their groups, names, common judge, and what differs in settings.

Runs whose settings differ in the seed alone (and in what leaves results alone) form a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffexpo.config.load import leaves
from diffexpo.config.resuming import CHANGEABLE
from diffexpo.errors import ConfigError
from diffexpo.evaluation.records import RunRecord, load_run
from diffexpo.evaluation.summary import Summary, summarise

BASE, HELDOUT = "base", "heldout"
BESIDE_RESULTS = ("name", "seed", "evaluation.bootstrap", "evaluation.grid_prompts", *CHANGEABLE)
"""Settings that do not tell groups apart."""
UNSET = "unset"


@dataclass(frozen=True)
class ReadRun:
    """A run as it was read."""

    name: str
    record: RunRecord
    summary: Summary
    settings: Mapping[str, object]

    @property
    def seed(self) -> int:
        return int(self.record.config.get("seed", 0))

    @property
    def key(self) -> str:
        """What runs of one group have in common."""
        return repr(sorted(item for item in self.settings.items() if item[0] not in BESIDE_RESULTS))

    @property
    def base_key(self) -> str:
        """What the base's images depend on besides their noise."""
        base = self.record.suites.get(BASE)
        return f"{self.settings.get('model.path')} {base.sampler if base else ''}"


def read_runs(folders: Sequence[Path]) -> list[ReadRun]:
    """Read run folders; those of one name are told apart by the folder above."""
    if not folders:
        raise ConfigError("no run to compare: expected at least one run folder")
    names = [folder.resolve().name for folder in folders]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        record = load_run(folder, with_images=False)
        shown = name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"
        runs.append(ReadRun(shown, record, summarise(record), dict(leaves(record.config))))
    return runs


def choose_judge(runs: Sequence[ReadRun], named: str | None) -> str:
    """The judge that decides; "" where nothing is evaluated yet."""
    if not runs:
        return named or ""
    roles = [run.record.suites[BASE].roles for run in runs]
    shared = [name for name in roles[0] if all(role.get(name) == HELDOUT for role in roles)]
    if named is not None and named not in shared:
        own_roles = zip((role.get(named) for role in roles), runs, strict=True)
        role, run = next((role, run) for role, run in own_roles if role != HELDOUT)
        why = f"it is a reward of {run.name}" if role else f"{run.name} was not evaluated with it"
        expected = f"expected one of {', '.join(shared)}" if shared else "the runs share none"
        raise ConfigError(f"judge {named}: {why}; {expected}")
    if not shared:
        have = "; ".join(
            f"{run.name}: {', '.join(name for name, role in own.items() if role == HELDOUT) or 'none'}"
            for run, own in zip(runs, roles, strict=True)
        )
        raise ConfigError(f"the runs share no held-out judge ({have}); evaluate them with the same judges")
    right = {run.summary.share_judge for run in runs}
    chosen = named or next((name for name in shared if right == {name}), shared[0])
    for run, own in zip(runs, roles, strict=True):
        about = run.record.suites[BASE].scorers
        if about.get(chosen) in {about.get(name) for name, role in own.items() if role == "train"}:
            raise ConfigError(f"judge {chosen}: {run.name} was trained with the same scorer; choose another")
    return chosen


def notes_on(runs: Sequence[ReadRun], judge: str) -> list[str]:
    """What a reader must know of the runs before believing the numbers, a sentence each."""
    found = [f"{run.name}: {problem}" for run in runs for problem in run.record.problems]
    versions: dict[str, str] = {}
    for run in runs:
        state, base = run.record.status.get("state", "unknown"), run.record.suites.get(BASE)
        if base is None:
            found.append(f"{run.name} has no evaluation yet (its state is {state}), so it has no numbers.")
            continue
        if not run.summary.is_finished:
            done = f"evaluated so far: {', '.join(run.record.suites)}"
            found.append(f"{run.name} is not evaluated to its end (its state is {state}); {done}.")
        versions.setdefault(base.scorers.get(judge, ""), run.name)
    if len(versions) > 1:
        told = "; ".join(f"{name}: {version}" for version, name in versions.items())
        found.append(f"The judge {judge} is not the same everywhere, so scores do not compare ({told}).")
    return found


def grouped(runs: Sequence[ReadRun]) -> tuple[list[list[ReadRun]], list[str]]:
    """Runs by group, ordered by seed, and a sentence for each that repeats another."""
    groups: dict[str, dict[int, ReadRun]] = {}
    repeated = []
    for run in runs:
        own = groups.setdefault(run.key, {})
        if run.seed in own:
            repeated.append(f"{run.name} repeats {own[run.seed].name} (settings and seed); it is left out.")
        else:
            own[run.seed] = run
    return [[own[seed] for seed in sorted(own)] for own in groups.values()], repeated


def labels_of(firsts: Sequence[ReadRun]) -> list[str]:
    """A short name for each group, told by what differs: methods, one or two settings, or the first run."""
    methods = [run.summary.method.name for run in firsts]
    if len(set(methods)) == len(methods):
        return methods
    differing = [path for path, own in _values(firsts).items() if len({repr(value) for value in own}) > 1]
    if 0 < len(differing) <= 2:
        short = [path.rpartition(".")[2] for path in differing]
        shown = short if len(set(short)) == len(short) else differing
        values = _values(firsts)
        return [
            ", ".join(f"{name} {values[path][i]}" for name, path in zip(shown, differing, strict=True))
            for i in range(len(firsts))
        ]
    return [run.name for run in firsts]


def _values(runs: Sequence[ReadRun]) -> dict[str, list[object]]:
    """Every setting that tells groups apart, with its value in each run."""
    paths = dict.fromkeys(path for run in runs for path in run.settings if path not in BESIDE_RESULTS)
    return {path: [run.settings.get(path, UNSET) for run in runs] for path in paths}


def differing(firsts: Mapping[str, ReadRun]) -> dict[str, dict[str, object]]:
    """The settings in which groups differ, each with its value by the group's label."""
    found = _values(list(firsts.values()))
    return {
        path: dict(zip(firsts, own, strict=True))
        for path, own in sorted(found.items())
        if len({repr(value) for value in own}) > 1
    }
