"""`diffexpo estimate`: what a recipe will take, before anything is downloaded or run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from diffexpo import assembly
from diffexpo.cli.completing import recipe_names
from diffexpo.cli.options import Set
from diffexpo.cli.progress import Console

if TYPE_CHECKING:
    from diffexpo.assembly import Advice, Computing, Estimate

GIB = 2**30


def estimate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE",
            help="Embedded recipes or YAML files, merged left to right.",
            autocompletion=recipe_names,
        ),
    ],
    overrides: Set = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Take these public settings for the model, e.g. sdxl, sd35-medium."
        ),
    ] = None,
    advice: Annotated[
        bool, typer.Option("--advice/--no-advice", help="Say what would make it fit on 12, 24 and 80 GB.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Count memory, disk and network evaluations of a recipe from configurations alone: no weights, no
    download.

    \b
    diffexpo estimate paper/expo_ii_sd15
    diffexpo estimate paper/expo_sdxl --set training.micro_batch_size=1
    """
    from diffexpo.config import load_config

    config = load_config(recipes, overrides or ()).config
    found = assembly.estimate(config, architecture=architecture)
    compute = assembly.computing(config, architecture=architecture)
    advices = assembly.advise(config, architecture=architecture) if advice else []
    if as_json:
        advised = [{"gib": one.gib, "total": one.total} | asdict(one) for one in advices]
        told = found.as_json() | {"computing": vars(compute), "advice": advised}
        print(json.dumps(told, indent=2))
        return
    console = Console(interactive=False)
    _print(found, compute, console)
    for one in advices:
        console.line(_sentence(one))
        for change in one.changes or ():
            settings = " ".join(f"--set {setting}" for setting in change.settings)
            console.line(f"    {settings}    ({change.price})")


def _print(found: Estimate, compute: Computing, console: Console) -> None:
    rows = [(item.what, item.count, item.phase, _gib(item.bytes)) for item in found.memory]
    console.table(f"memory ({found.source})", ["what", "count", "when", "GiB"], rows)
    console.line(f"  largest at once {_gib(found.total)} GiB (always, and the largest other phase)")
    console.line()
    files = [(item.what, item.count, _gib(item.bytes)) for item in found.disk]
    console.table("disk", ["what", "count", "GiB"], files)
    console.line(f"  in all {_gib(found.on_disk)} GiB")
    console.line()
    cost = found.cost
    console.line(f"{cost.total:,} network evaluations ({cost.split}), {cost.images:,} images")
    speed = f"{compute.hours:,.3g} GPU-hours at {compute.rate / 1e12:.0f} TFLOP/s"
    console.line(f"{compute.flops / 1e12:.3g} TFLOP each: {speed}, scoring and evaluation apart")
    for note in found.notes:
        console.warning(note)
    exact = "weights are exact, activations are counted tensor by tensor"
    console.line(f"An estimate: {exact}, workspace inside kernels is not counted.")


def _sentence(one: Advice) -> str:
    if one.changes is None:
        return f"{one.gib:g} GB: does not fit; {_gib(one.total)} GiB with everything that saves memory"
    return f"{one.gib:g} GB: fits ({_gib(one.total)} GiB){' with' if one.changes else ''}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
