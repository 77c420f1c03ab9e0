"""What is done with an existing run: its next stage of a kind, its export, its report, what to cite."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.cli.failures import working_on
from diffexpo.cli.options import Run
from diffexpo.cli.progress import Console


def run_stage(run: str | None, name: str) -> None:
    """Run the next stage of a kind."""
    with working_on(run) as run_dir:
        console = Console()
        console.attach_log(run_dir / "log.txt")
        assembly.stage(run_dir, name, console)


def collect(run: Run = None) -> None:
    """Draw and score the images of the next iteration (does nothing if they are complete)."""
    run_stage(run, "collect")


def pair(run: Run = None) -> None:
    """Rank what was collected and keep the best and the worst image of every prompt."""
    run_stage(run, "pair")


def train(run: Run = None) -> None:
    """Train the next iterate on the offline and all online pairs; continues at the last checkpoint."""
    run_stage(run, "train")


def evaluate(run: Run = None) -> None:
    """Draw the held-out prompts with the newest iterate and score them by the held-out judges."""
    run_stage(run, "evaluate")


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
    run: Run = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print BibTeX entries.")] = False,
) -> None:
    """List the papers, models, data and software that a run used, from its settings alone."""
    with working_on(run) as run_dir:
        from diffexpo.config import read_resolved
        from diffexpo.config.citations import citations

        found = citations(read_resolved(run_dir / "config.yaml").config)
        print(found.as_bibtex() if bibtex else found.as_text())
