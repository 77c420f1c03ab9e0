"""`diffexpo study`: compare models by people, blind, by a protocol that is fixed beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.label import Certificate, Host, Key, Port, serve_until_stopped
from diffexpo.cli.options import AsJson

app = typer.Typer(
    no_args_is_help=True,
    help="Compare models by people: write a protocol and its questions, serve the rating page, report.",
)
Folder = Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of the study.")]


# Many parameters because each is an option of the command.
@app.command()
def new(
    study: Folder,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME=SOURCE",
            help="A model: an evaluation of a run (runs/expo:base), or a folder of images. Repeatable.",
        ),
    ] = None,
    protocol: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Protocol to begin with; options come before it.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare every model with this one only.")
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option("--question", help="aesthetics, alignment or quality; default: all three. Repeatable."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="How many prompts; default: all that are shared.")
    ] = None,
    votes: Annotated[int | None, typer.Option(help="Votes on each pair, for each question (3).")] = None,
    raters: Annotated[int | None, typer.Option(help="People who are to take part (10).")] = None,
    seed: Annotated[int | None, typer.Option(help="Names the choice and order of prompts (0).")] = None,
    at_once: Annotated[bool, typer.Option("--at-once", help="All questions on a pair on one page.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a study: protocol, images and questions. Says what it costs in votes and what it can see."""
    given: dict[str, object] = {
        "against": against,
        "prompts": prompts,
        "votes": votes,
        "raters": raters,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if at_once:
        if protocol is not None:
            raise ConfigError("--at-once with --protocol: set rating.at_once in the protocol")
        given["rating"] = {"at_once": True}
    if question:
        given["questions"] = question
    if model:
        given["models"] = _models(model)
    if protocol is None:
        given["name"] = study.resolve().name
    told = list(assembly.new_study(study, protocol, given))
    if as_json:
        print(json.dumps({"protocol": str(study / "protocol.yaml"), "told": told}))
        return
    print("\n".join(told))
    print(f"protocol: {study / 'protocol.yaml'}, fixed from now on")
    print(f"links for raters: diffexpo label links {study} --raters {raters or 10}")
    print(f"serve it: diffexpo study serve {study}")


def _models(named: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in named:
        name, equals, source = text.partition("=")
        if not (name and equals and source) or name in found:
            raise ConfigError(
                f"--model {text!r}: expected NAME=SOURCE, each name once, e.g. base=runs/expo:base"
            )
        found[name] = source
    return found


@app.command()
def serve(
    study: Folder,
    host: Host = "127.0.0.1",
    port: Port = 8189,
    certificate: Certificate = None,
    key: Key = None,
) -> None:
    """Serve the study's rating page until interrupted; raters come by the links of `diffexpo label links`."""
    site = {"host": host, "port": port, "certificate": certificate, "key": key}
    serve_until_stopped(assembly.find_book(study), False, **site)


@app.command()
def report(study: Folder, as_json: AsJson = False) -> None:
    """Write report.md, report.json and votes.parquet: win rates, agreement, strengths, who was left out."""
    path = assembly.report_study(study, lambda text: typer.echo(text, err=as_json))
    print((study / "report.json").read_text(encoding="utf-8") if as_json else f"report: {path}")
