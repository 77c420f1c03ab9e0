"""`diffexpo cite`: what a run used, to be cited."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo.cli.failures import Boundary
from diffexpo.cli.folders import find_run
from diffexpo.cli.stages import Run


def cite(
    run: Run = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Print BibTeX entries.")] = False,
) -> None:
    """List the papers, models, data and software that a run used, from its settings alone."""
    run_dir = find_run(run)
    with Boundary(run_dir):
        from diffexpo.config import read_resolved
        from diffexpo.config.citations import citations

        found = citations(read_resolved(run_dir / "config.yaml").config)
        print(found.as_bibtex() if bibtex else found.as_text())
