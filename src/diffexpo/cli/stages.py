"""What is done with an existing run: its next stage of a kind, its export, its report."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo.cli.failures import Boundary
from diffexpo.cli.folders import find_run
from diffexpo.cli.progress import Console

Run = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Run folder or name; default: the most recent.")
]


def run_stage(run: str | None, name: str) -> None:
    """Run the next stage of a kind."""
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo import assembly

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
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo import assembly

        for path in assembly.export(run_dir):
            print(path)


def report(run: Run = None) -> None:
    """Write report.html again from the files of a run (finished or not) and print its path."""
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo import assembly

        print(f"report: {assembly.write_report(run_dir)}")
