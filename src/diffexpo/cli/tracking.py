"""`diffexpo track`: a run's files handed on to trackers of experiments."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.failures import working_on
from diffexpo.cli.options import AsJson, Run

KINDS = ("tensorboard", "wandb", "mlflow")


def track(
    run: Run = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TRACKER", help=f"{', '.join(KINDS)}; default tensorboard. Repeatable."),
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Project or experiment; default: tracking.project of the run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hand on a run's metrics and images to trackers; what they have already is not sent again.

    A run does it while it works with `--set tracking.trackers=[tensorboard]`.
    """
    kinds = to or ["tensorboard"]
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--to {kind!r}: expected one of {', '.join(KINDS)}")
    with working_on(run) as run_dir:
        lines = assembly.track(run_dir, kinds, project)
        told = [f"{kind}: {count} lines of {run_dir / 'metrics.jsonl'}" for kind, count in lines.items()]
        if "tensorboard" in kinds:
            told.append(f"look at it: tensorboard --logdir {run_dir / 'tracking'}")
        print(json.dumps(lines) if as_json else "\n".join(told))
