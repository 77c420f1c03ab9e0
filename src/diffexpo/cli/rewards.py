"""`diffexpo rewards`: which scorers there are, and whether one works on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from diffexpo.cli import rewards_serve
from diffexpo.cli.progress import Console

app = typer.Typer(
    no_args_is_help=True,
    help="List scorers, check one against what is known of it, serve one to other machines.",
)
rewards_serve.register(app)


@app.command("list")
def list_scorers(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the types of rewards: what each scores, its unit, where its weights are found, its licence."""
    from diffexpo.config.rewards import REWARDS

    if as_json:
        print(json.dumps({name: card.facts() for name, card in REWARDS.items()}, indent=2))
        return
    rows = [(name, card.what, card.unit, card.needs(), card.licence) for name, card in REWARDS.items()]
    console = Console(interactive=False)
    console.table("rewards", ["type", "what", "unit", "needs", "licence"], rows)
    console.line("check one with `diffexpo rewards verify TYPE`")


# Many parameters because each is an option of the command.
@app.command()
def verify(
    what: Annotated[
        str,
        typer.Argument(metavar="TYPE|RECIPE", help="Type of reward, or a recipe whose rewards are meant."),
    ],
    path: Annotated[str | None, typer.Option(help="Weights, as `path` of the reward.")] = None,
    base: Annotated[str | None, typer.Option(help="Model they stand on, as `base` of the reward.")] = None,
    scale: Annotated[str | None, typer.Option(help="raw, percent or logit.")] = None,
    precision: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    write: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with the scores in this JSON file.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest relative difference that passes.")
    ] = 1e-3,
    pictures: Annotated[
        Path | None, typer.Option(help="Write the images and captions that are scored to this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score shipped images and check the result; exit code 4 if a check fails.

    Without a reference the checks are those that every good scorer passes: finite, the same alone as in a
    batch, higher for the right caption than for another one's, within the usual range. With one (shipped for
    JPEG and the emoji judges, else `--against`, made by the official code on the images of `--pictures`)
    the scores themselves are compared.
    """
    from diffexpo import assembly

    reports = assembly.verify_rewards(
        what,
        path=path,
        base=base,
        scale=scale,
        precision=precision,
        device=device,
        against=against,
        tolerance=tolerance,
        pictures=pictures,
    )
    if write is not None:
        assembly.write_scores(reports, write)
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        console = Console(interactive=False)
        for report in reports:
            console.table(report.title, ["picture", "prompt", "score", "other prompt"], report.rows())
            for check in report.checks:
                console.line(f" {check.state.upper():4}  {check.what}")
    assembly.require_passed(reports)
