"""What is done with an existing run: its next stage of a kind, its export, its report, what to cite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.cli.failures import working_on
from diffexpo.cli.options import Run
from diffexpo.cli.progress import Console

SINGLE_STAGES = {
    "collect": "Draw and score the images of the next iteration (does nothing if they are complete).",
    "pair": "Rank what was collected and keep the best and the worst image of every prompt.",
    "train": "Train the next iterate on the offline and all online pairs; continues at the last checkpoint.",
    "evaluate": "Draw the held-out prompts with the newest iterate and score them by the held-out judges.",
}


def stage_command(name: str) -> Callable[[Run], None]:
    """The command that runs the next stage of a kind."""

    def command(run: Run = None) -> None:
        with working_on(run) as run_dir:
            console = Console()
            console.attach_log(run_dir / "log.txt")
            assembly.stage(run_dir, name, console)

    return command


def export(run: Run = None) -> None:
    """Write the trained LoRA (or whole pipeline) for plain diffusers, reloaded there and compared."""
    with working_on(run) as run_dir:
        for path in assembly.export(run_dir):
            print(path)


def report(run: Run = None) -> None:
    """Write report.html again from the files of a run (finished or not) and print its path."""
    with working_on(run) as run_dir:
        print(f"report: {assembly.write_report(run_dir)}")


def cite(
    run: Run = None, bibtex: Annotated[bool, typer.Option("--bibtex", help="Print BibTeX entries.")] = False
) -> None:
    """List the papers, models, data and software that a run used, from its settings alone."""
    with working_on(run) as run_dir:
        from diffexpo.config import read_resolved
        from diffexpo.config.citations import citations

        found = citations(read_resolved(run_dir / "config.yaml").config)
        print(found.as_bibtex() if bibtex else found.as_text())
