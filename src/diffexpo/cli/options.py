"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo.cli.completing import run_names, setting_names

Run = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", help="Run folder or name; default: the most recent.", autocompletion=run_names
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting, e.g. --set training.steps=100. Repeatable.",
        autocompletion=setting_names,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
