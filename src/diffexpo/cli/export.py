"""`diffexpo export`: weights that plain diffusers loads."""

from __future__ import annotations

from diffexpo.cli.failures import Boundary
from diffexpo.cli.folders import find_run
from diffexpo.cli.stages import Run


def export(run: Run = None) -> None:
    """Write the trained LoRA (or the whole pipeline) for plain diffusers, reload it and compare before saying
    so."""
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo import assembly

        for path in assembly.export(run_dir):
            print(path)
