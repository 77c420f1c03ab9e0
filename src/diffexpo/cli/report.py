"""`diffexpo report`: the HTML report of a run, from its files only."""

from __future__ import annotations

from diffexpo.cli.failures import Boundary
from diffexpo.cli.folders import find_run
from diffexpo.cli.stages import Run


def report(run: Run = None) -> None:
    """Write report.html again from the files of a run (finished or not) and print its path."""
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo import assembly

        print(f"report: {assembly.report(run_dir)}")
