"""`diffexpo data`: look at, check, export and redraw what a run has stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from diffexpo.cli.folders import find_run

app = typer.Typer(no_args_is_help=True, help="Inspect, verify, export and regenerate the data of a run.")
Run = Annotated[str, typer.Argument(help="Run folder or name.")]


@app.command()
def inspect(
    run: Run,
    pair: Annotated[
        str | None, typer.Argument(metavar="PAIR", help="A pair's id; without one the store is summed up.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the whole history of a pair: both images, their agents, seeds, sampler, rewards, weights and files."""
    from diffexpo import build

    found = build.inspect(find_run(run), pair)
    if as_json:
        print(json.dumps(found, indent=2, default=str))
    else:
        print("\n".join(_lines(found, 0)))


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Parquet file to write.")],
) -> None:
    """Write all pairs as one Parquet file in the Pick-a-Pic v2 columns, images included."""
    from diffexpo import build

    rows = build.export_pairs(find_run(run), target)
    print(f"{rows} pairs: {target}")


@app.command()
def verify(run: Run) -> None:
    """Recompute the checksum and row count of every stored file; exit code 4 if one differs."""
    from diffexpo.data.store import Store

    run_dir = find_run(run)
    count = Store(run_dir / "store").verify()
    print(f"{run_dir / 'store'}: {count} files are as their manifests say")


@app.command()
def regenerate(
    run: Run,
    sample: Annotated[str, typer.Argument(metavar="SAMPLE_ID", help="Id of a stored sample.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.png", help="Picture to write.")],
) -> None:
    """Draw an image again from its row alone and compare it with the stored latents, bit for bit."""
    from diffexpo import build

    print("\n".join(_lines(build.regenerate(find_run(run), sample, target), 0)))


def _lines(value: object, indent: int) -> Iterator[str]:
    """Nested values as indented lines."""
    pad = "  " * indent
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, (dict, list)) and inner:
                yield f"{pad}{key}:"
                yield from _lines(inner, indent + 1)
            else:
                yield f"{pad}{key}: {'' if inner is None else inner}".rstrip()
    elif isinstance(value, list):
        for inner in value:
            lines = list(_lines(inner, indent + 1))
            yield f"{pad}- {lines[0].lstrip()}"
            yield from lines[1:]
    else:
        yield f"{pad}{value}"
