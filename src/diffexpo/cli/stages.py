"""What is done with an existing run: its next stage of a kind, its export, its report, what to cite."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.completing import run_names
from diffexpo.cli.failures import working_on
from diffexpo.cli.options import AsJson, Run
from diffexpo.cli.processes import is_first
from diffexpo.cli.progress import Console, Nowhere

SINGLE_STAGES = {
    "collect": "Draw and score the images of the next iteration (does nothing if they are complete).",
    "pair": "Rank what was collected and keep the best and the worst image of every prompt.",
    "train": "Train the next iterate on the offline and all online pairs; continues at the last checkpoint.",
}


def stage_command(name: str) -> Callable[[Run, bool], None]:
    """The command that runs the next stage of a kind."""

    def command(run: Run = None, as_json: AsJson = False) -> None:
        with working_on(run) as run_dir:
            console = Console(Nowhere() if as_json else None)
            console.attach_log(run_dir / "log.txt")
            done = assembly.stage(run_dir, name, console)
            if as_json and is_first():
                print(json.dumps({"folder": str(run_dir)} | done))

    return command


def export(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder or name, RUN@2 for an iterate; default: the newest.",
            autocompletion=run_names,
        ),
    ] = None,
    iteration: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="This iterate, to export/iteration-N.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Of LoRA too: a whole pipeline with the adapters folded in.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this repository of the hub too."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who sees a repository that --push makes.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write the trained LoRA (or whole pipeline) for plain diffusers, reloaded there and compared."""
    from diffexpo.config.iterates import split_iterate

    if push is not None:
        assembly.check_repository(push)

    name, chosen = (None, None) if run is None else split_iterate(run)
    if chosen is not None and iteration not in (None, chosen):
        raise ConfigError(f"{run} --iteration {iteration}: two iterates are named; leave one out")
    with working_on(name) as run_dir:
        paths = assembly.export(run_dir, iteration=iteration if chosen is None else chosen, whole=whole)
        told = [str(path) for path in paths]
        if push is not None:
            told.append(assembly.push(run_dir, paths[0], push, private=private))
        print(json.dumps(told) if as_json else "\n".join(told))


def report(run: Run = None, as_json: AsJson = False) -> None:
    """Write report.html and summary.json again from the files of a run (finished or not); print the path."""
    with working_on(run) as run_dir:
        path = assembly.write_report(run_dir)
        told = (run_dir / "summary.json").read_text(encoding="utf-8") if as_json else f"report: {path}"
        print(told)


def cite(
    run: Run = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print BibTeX entries.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the papers, models, data and software that a run used, from its settings alone."""
    with working_on(run) as run_dir:
        from diffexpo.config import read_resolved
        from diffexpo.config.citations import citations

        found = citations(read_resolved(run_dir / "config.yaml").config)
        told = found.as_bibtex() if bibtex else found.as_text()
        print(json.dumps(told.splitlines()) if as_json else told)
