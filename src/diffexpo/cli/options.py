"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Run = Annotated[
    str | None, typer.Argument(metavar="RUN", help="Run folder or name; default: the most recent.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one setting, e.g. --set training.steps=100. Repeatable."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
