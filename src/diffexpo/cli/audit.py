"""`diffexpo audit`: who is drawn where a prompt does not say, and how much of it is unsafe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.cli.options import AsJson, Set
from diffexpo.cli.progress import Console, Nowhere


def audit(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="[NAME=]SOURCE: a run (its base and its result), RUN@2 (an iterate), or a base model.",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="scenes, occupations or a YAML file; default: by the models."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Default: `audit` in the run's folder, else `audit`."),
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Draw prompts that leave gender or skin tone open, count who is drawn, and how much is unsafe.

    The last model is compared with the first one. What the classifier says is corrected for its error on
    labelled images. Images that are there already are used again.

    \b
    diffexpo audit runs/mine                         before and after, on the embedded world
    diffexpo audit scenes:diffusion other=FOLDER     two base models
    diffexpo audit FOLDER --set 'classifier={name: reader, type: clip, path: CLIP}' --set labelled=PHOTOS
    """
    page = assembly.audit(models, protocol, overrides or (), out, Console(Nowhere() if as_json else None))
    print(page.with_suffix(".json").read_text(encoding="utf-8") if as_json else f"audit: {page}")
