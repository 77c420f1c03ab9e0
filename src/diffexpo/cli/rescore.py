"""`diffexpo rescore`: stored images judged anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.cli.completing import run_names
from diffexpo.cli.failures import boundary
from diffexpo.cli.folders import RUNS, find_run
from diffexpo.cli.options import AsJson, Set
from diffexpo.cli.progress import Console, Nowhere


def rescore(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or name.", autocompletion=run_names)],
    to: Annotated[
        str, typer.Option("--to", metavar="RUN2", help="Name of the new run, in runs/, or its folder.")
    ],
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Judge the stored images of a run by other rewards and pair them anew, without drawing.

    \b
    diffexpo rescore expo --to expo-jpeg --set 'rewards=[{name: jpeg, type: jpeg_compressibility}]'
    diffexpo rescore expo --to expo-clear --set pairing.min_margin=0.2
    diffexpo run --resume expo-jpeg       trains on the new pairs, drawing nothing that is there
    """
    source = find_run(run)
    target = Path(to) if len(Path(to).parts) > 1 else RUNS / to
    console = Console(Nowhere() if as_json else None)
    with boundary(target):
        named = [*(overrides or []), f"name={json.dumps(target.name)}"]
        done = assembly.rescore(source, target, named, console)
        console.line(f"{done['images']} images judged anew, {done['pairs']} pairs: {target}")
        console.line(f"train on them with: diffexpo run --resume {target}")
        if as_json:
            print(json.dumps({"folder": str(target)} | done))
