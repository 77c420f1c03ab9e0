"""`diffexpo collect | pair | train | evaluate`: the next stage of that kind of an existing run."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo.cli.failures import Boundary
from diffexpo.cli.folders import find_run
from diffexpo.cli.progress import Console

Run = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Run folder or name; default: the most recent.")
]


def _stage(run: str | None, name: str) -> None:
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo import assembly

        console = Console()
        console.attach_log(run_dir / "log.txt")
        assembly.stage(run_dir, name, console)


def collect(run: Run = None) -> None:
    """Draw and score the images of the next iteration (does nothing if they are complete)."""
    _stage(run, "collect")


def pair(run: Run = None) -> None:
    """Rank what was collected and keep the best and the worst image of every prompt."""
    _stage(run, "pair")


def train(run: Run = None) -> None:
    """Train the next iterate on the offline and all online pairs; continues at the last checkpoint."""
    _stage(run, "train")


def evaluate(run: Run = None) -> None:
    """Draw the held-out prompts with the newest iterate and score them by the held-out judges."""
    _stage(run, "evaluate")
