"""`diffexpo run`: the whole loop, new or resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffexpo import __version__, assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli import processes as several
from diffexpo.cli.completing import recipe_names
from diffexpo.cli.failures import boundary
from diffexpo.cli.folders import RUNS, find_run, free_folder, is_finished, run_state
from diffexpo.cli.options import Set
from diffexpo.cli.progress import Console, Nowhere

if TYPE_CHECKING:
    from diffexpo.config import LoadedConfig, RunConfig


@contextmanager
def deadline(minutes: float | None) -> Iterator[None]:
    """Interrupt the block after a number of minutes, as Ctrl-C would: the run saves itself for a resume."""
    timer = threading.Timer(60.0 * (minutes or 0.0), os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    if minutes is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


# Many parameters because each is an option of the command.
def run(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE",
            help="Embedded recipes or YAML files, merged left to right; with --resume a run folder.",
            autocompletion=recipe_names,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run: the folder or name given, else the most recent.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run; its folder is runs/NAME.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the run, instead of runs/NAME.")
    ] = None,
    overrides: Set = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print summary.json at the end, or a dry run's plan.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings, print the plan, do nothing.")
    ] = False,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Stop after this long, saved and resumable (exit code 75).")
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this stage; --dry-run lists the stages.")
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Go on although settings, code or files are not those that the run began with; recorded.",
        ),
    ] = False,
    processes: Annotated[
        str,
        typer.Option(metavar="N|auto", help="Processes to share the work; auto: one a GPU, or up to 4."),
    ] = "1",
) -> None:
    """Align a model: explore, judge, train, evaluate; ends with a report.

    Ctrl-C (or a crash) loses nothing: `diffexpo run --resume` continues and ends with the very same weights.

    \b
    diffexpo run scenes/expo                     the embedded example, minutes on two cores
    diffexpo run scenes/expo --set seed=1        another seed
    diffexpo run scenes/expo my.yaml --dry-run   my.yaml on top of the recipe; print the plan only
    diffexpo run --resume                        continue the most recent run
    diffexpo run --resume --set training.micro_batch_size=2    the same with less memory, at the same results
    """
    count = several.number_of_processes(processes)
    loaded, run_dir = (_resume if resume else _start)(recipes or [], out, name, overrides or ())
    console = Console(Nowhere() if as_json else None)
    for note in () if as_json else loaded.notes:
        console.warning(note)
    if dry_run:
        _print_plan(loaded.config, run_dir, stop_after, console, as_json)
        return
    if resume and is_finished(run_dir):
        _print_complete(run_dir, loaded.config, as_json, console)
        return
    if count > 1 and not several.is_started_by_a_launcher():
        # The folder is named: processes that start at once would each choose one.
        named = ["--resume", str(run_dir)] if resume else [*(recipes or []), "--out", str(run_dir)]
        named += [] if name is None or resume else ["--name", name]
        named += [part for override in overrides or () for part in ("--set", override)]
        named += [] if max_minutes is None else ["--max-minutes", str(max_minutes)]
        named += [] if stop_after is None else ["--stop-after", stop_after]
        named += ["--json"] * as_json + ["--accept-changes"] * accept_changes
        raise typer.Exit(several.run_in_processes(["run", *named], count))
    with boundary(run_dir), deadline(max_minutes):
        _print_header(loaded.config, run_dir, resume, console)
        options = {"sources": loaded.sources, "stop_after": stop_after, "resume": resume, "console": console}
        report = assembly.run(loaded.config, run_dir, **options, accept_changes=accept_changes)
        stopped = f"stopped after {stop_after}; continue with: diffexpo run --resume {run_dir}"
        console.line(f"report: {report}" if stop_after is None else stopped)
    _print_summary(run_dir, as_json)


def _print_complete(run_dir: Path, wanted: RunConfig, as_json: bool, console: Console) -> None:
    from diffexpo.config.resuming import unused_changes

    for text in unused_changes(run_dir / "config.yaml", wanted):
        print(f"warning: {text}", file=sys.stderr)
    _print_summary(run_dir, as_json)
    console.line(f"{run_dir} is complete; nothing to resume")
    console.line(f"report: {run_dir / 'report.html'}")


def _print_summary(run_dir: Path, as_json: bool) -> None:
    """The numbers of a run that has ended, or the state of one that was stopped, as JSON."""
    if as_json and several.is_first():
        path = run_dir / "summary.json"
        state = json.dumps({"folder": str(run_dir), "state": run_state(run_dir)})
        print(path.read_text(encoding="utf-8") if path.is_file() else state)


def _start(
    recipes: list[str], out: Path | None, name: str | None, overrides: Sequence[str]
) -> tuple[LoadedConfig, Path]:
    """Settings and folder of a new run.

    A folder that the user named is used as it is (the run continues in it if the settings are the same and is
    refused otherwise); a recipe's own name gets the next free number. Several processes that start at once
    must agree on the folder, so they get no number.
    """
    from diffexpo.config import list_recipes, load_config

    if not recipes:
        known = ", ".join(recipe.name for recipe in list_recipes())
        raise ConfigError(f"no recipe given: expected an embedded recipe or a YAML file (embedded: {known})")
    loaded = load_config(recipes, [*overrides, *([] if name is None else [f"name={json.dumps(name)}"])])
    if out is not None:
        return loaded, out
    is_chosen = loaded.sources["name"].startswith("--set")
    if is_chosen or several.is_started_by_a_launcher():
        return loaded, RUNS / loaded.config.name
    return loaded, free_folder(loaded.config.name)


def _resume(
    recipes: list[str], out: Path | None, name: str | None, overrides: Sequence[str]
) -> tuple[LoadedConfig, Path]:
    from diffexpo.config.resuming import resumed_config

    named = [*recipes, *(str(given) for given in (name, out) if given is not None)]
    if len(named) > 1:
        raise ConfigError(f"--resume continues one run, not {len(named)} ({', '.join(named)})")
    run_dir = find_run(named[0] if named else None)
    return resumed_config(run_dir / "config.yaml", overrides), run_dir


def _print_plan(
    config: RunConfig, run_dir: Path, stop_after: str | None, console: Console, as_json: bool
) -> None:
    """The plan, once it is known that everything that it names is there; a resumed run needs less."""
    from diffexpo.config import config_notes

    assembly.parse_stage(config, stop_after)
    missing = [] if (run_dir / "config.yaml").is_file() else assembly.check_inputs(config)
    rows, notes = assembly.plan(config), [*missing, *config_notes(config)]
    if as_json:
        stages = [{"stage": stage, "what": what} for stage, what in rows]
        print(json.dumps({"folder": str(run_dir), "plan": stages, "notes": notes}, indent=2))
        return
    console.table(f"plan of {run_dir}", ["stage", "what"], rows)
    for note in notes:
        console.warning(note)
    console.line("nothing was run (--dry-run)")


def _print_header(config: RunConfig, run_dir: Path, resume: bool, console: Console) -> None:
    verb = "resumes" if resume else "runs"
    has_agents = config.explore.iterations > 1 and not config.algorithm.draws_first
    agents = f", {config.explore.agents} agent{'s' * (config.explore.agents > 1)}" if has_agents else ""
    how = f"({config.tuning.kind}{agents}), {config.explore.iterations} iterations"
    console.line(f"diffexpo {__version__} {verb} {config.algorithm.type} on {config.model.path} {how}")
    where = f"folder {run_dir} | settings {run_dir / 'config.yaml'}"
    console.line(f"device {_device(config)} | seed {config.seed} | {where}")


def _device(config: RunConfig) -> str:
    import torch

    if config.model.device != "auto":
        return config.model.device
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"cpu ({torch.get_num_threads()} threads)"
