"""`diffexpo verify`: whether a run folder is whole."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import DiffexpoError
from diffexpo.cli.folders import find_run
from diffexpo.cli.options import AsJson


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or name.")],
    restore_settings: Annotated[
        bool,
        typer.Option("--restore-settings", help="Write config.yaml again as the run's record has it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at every file of a run: settings, inputs, store, weights, suites, metrics, report and export.

    Says what is damaged and how it is made again; exit code 4 if anything is. Nothing but config.yaml is ever
    written, and that only with --restore-settings.
    """
    run_dir = find_run(run)
    if restore_settings:
        path = assembly.restore_settings(run_dir)
        if not as_json:
            print(f"wrote {path}")
    found = assembly.verify_run(run_dir)
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=2))
    for finding in () if as_json else found:
        print(f"{finding.state:4}  {finding.what}")
    if failed := sum(finding.state == "fail" for finding in found):
        raise DiffexpoError(f"{run_dir}: {failed} of {len(found)} parts are not what was written (above)")
