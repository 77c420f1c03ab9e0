"""`diffexpo sweep`: the product of settings as runs of one folder, each in a process of its own, then their
comparison.

    <folder>/sweep.json            what was asked for
    <folder>/<name>/               a run, named by the settings that vary
    <folder>/<name>.txt            what it printed, where several run at once
    <folder>/comparison.html ...   the page, as far as runs are evaluated
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffexpo.assembly.checking import check_inputs
from diffexpo.assembly.folders import describe_differences, has_made_nothing, read_status
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.product import Combination
from diffexpo.config.resuming import CHANGEABLE, differences
from diffexpo.errors import EXIT_INTERRUPTED, ConfigError, DiffexpoError, Interrupted
from diffexpo.evaluation.comparison import compare_runs
from diffexpo.evaluation.comparison_page import write_comparison
from diffexpo.evaluation.records import is_saved
from diffexpo.files import write_json
from diffexpo.online.cost import run_cost
from diffexpo.online.loop import Console
from diffexpo.training.signals import StopSignal

POLL_S = 0.1


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its folder, what it is started with, its settings."""

    folder: Path
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def name(self) -> str:
        """The settings that vary, as the folder is called."""
        return self.folder.name

    @property
    def state(self) -> str:
        """`state` of status.json; "new" before there is one."""
        return read_status(self.folder)

    @property
    def evaluations(self) -> int:
        """Network evaluations that it is planned to take."""
        return run_cost(self.config).total


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, in order, and the recipes that they share."""

    folder: Path
    recipes: tuple[str, ...]
    runs: tuple[SweepRun, ...]


def plan_sweep(recipes: Sequence[str], combinations: Sequence[Combination], folder: Path) -> Sweep:
    """The runs of a sweep, with what they name looked for.

    Args:
        recipes: As given to `load_product`, and its `combinations`.
        folder: Where the runs go, each in a folder of its combination's name.
    Raises:
        ConfigError: a folder holds a run with other settings.
        MissingError: a model, reward or file is not there.
    """
    runs = tuple(SweepRun(folder / one.name, one.overrides, one.config) for one in combinations)
    for run in runs:
        _check_folder(run)
        if run.state != "finished":
            check_inputs(run.config)
    return Sweep(folder, tuple(recipes), runs)


def run_sweep(sweep: Sweep, console: Console, *, processes: int = 1, is_quiet: bool = False) -> list[Path]:
    """Run what is not finished, `processes` at once, resuming what was begun, and compare all runs.
    Several at once, and quiet ones, print to NAME.txt.

    Returns the files of the comparison. A run that fails leaves the others at work.

    Raises:
        Interrupted: a signal arrived and the runs saved themselves.
        DiffexpoError: runs failed, or wait for people; the comparison of all that is evaluated is written.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    asked = {"recipes": sweep.recipes, "runs": {run.name: run.overrides for run in sweep.runs}}
    write_json(sweep.folder / "sweep.json", asked)
    waiting = deque(run for run in sweep.runs if run.state != "finished")
    if len(waiting) < len(sweep.runs):
        console.line(f"{len(sweep.runs) - len(waiting)} of {len(sweep.runs)} runs are finished already")
    failed = _work_off(sweep, waiting, console, processes, is_quiet or processes > 1)
    evaluated = [run.folder for run in sweep.runs if is_saved(run.folder / "eval" / "base")]
    paths = write_comparison(compare_runs(evaluated), sweep.folder) if evaluated else []
    if failed:
        shown = ", ".join(f"{name} (exit code {code})" for name, code in failed.items())
        advice = "the messages are in log.txt of their folders; the same command tries them again"
        raise DiffexpoError(f"{len(failed)} of {len(sweep.runs)} runs did not finish: {shown}; {advice}")
    return paths


def _work_off(
    sweep: Sweep, waiting: deque[SweepRun], console: Console, processes: int, is_quiet: bool
) -> dict[str, int]:
    """Run all that wait; returns exit codes of those that failed."""
    active: dict[SweepRun, subprocess.Popen[bytes]] = {}
    failed: dict[str, int] = {}
    with StopSignal() as stop, _ended(active):
        while waiting or active:
            while waiting and len(active) < processes and stop.received is None:
                run = waiting.popleft()
                console.line(f"{run.name}: {'starts' if run.state == 'new' else 'goes on'} in {run.folder}")
                active[run] = _start(sweep, run, processes, is_quiet)
            time.sleep(POLL_S)
            if stop.received is not None:
                _interrupt(active)
            for run in [run for run, child in active.items() if child.poll() is not None]:
                code = active.pop(run).returncode
                if code == EXIT_INTERRUPTED:
                    stop.stop("one of its runs was interrupted")
                    continue
                console.line(f"{run.name}: {'done' if code == 0 else f'not finished (exit code {code})'}")
                failed |= {run.name: code} if code else {}
    return failed


@contextmanager
def _ended(active: Mapping[SweepRun, subprocess.Popen[bytes]]) -> Iterator[None]:
    """No process outlives the block, whatever ends it."""
    try:
        yield
    finally:
        for child in active.values():
            child.terminate()


def _interrupt(active: dict[SweepRun, subprocess.Popen[bytes]]) -> None:
    """Pass a signal on, wait until all runs are saved, and raise Interrupted."""
    for child in active.values():
        child.send_signal(signal.SIGINT)
    for child in active.values():
        child.wait()
    active.clear()
    raise Interrupted("the sweep was stopped; every run is saved: the same command continues it")


def _start(sweep: Sweep, run: SweepRun, processes: int, is_quiet: bool) -> subprocess.Popen[bytes]:
    """A process for a run, in a session of its own: only this one gets a Ctrl-C, and passes it on once."""
    command = [sys.executable, "-m", "diffexpo", "run"]
    if (run.folder / "config.yaml").is_file() and not has_made_nothing(run.folder):
        command += ["--resume", str(run.folder)]
    else:
        command += [*sweep.recipes, "--out", str(run.folder)]
        own = [override for override in run.overrides if not override.startswith("name=")]
        named = f"name={json.dumps(run.config.name)}"
        command += [part for override in (*own, named) for part in ("--set", override)]
    environment = dict(os.environ)
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not is_quiet:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    with (sweep.folder / f"{run.name}.txt").open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _check_folder(run: SweepRun) -> None:
    """Refuse a folder whose run was made with other settings."""
    path = run.folder / "config.yaml"
    if not path.is_file() or has_made_nothing(run.folder):
        return
    before = read_resolved(path).config
    changed = [name for name in differences(before, run.config) if name not in CHANGEABLE]
    if changed:
        told = describe_differences(before, run.config, changed)
        advice = "choose another folder with --out"
        raise ConfigError(f"{run.folder} holds a run with other settings ({told}); {advice}")
