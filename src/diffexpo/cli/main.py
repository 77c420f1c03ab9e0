"""The command tree and the entry point."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo import __version__
from diffexpo.cli import config, data, doctor, improve, label, recipes, rewards, study
from diffexpo.cli.audit import audit
from diffexpo.cli.compare import compare, sweep
from diffexpo.cli.estimate import estimate
from diffexpo.cli.evaluate import evaluate, suites, table
from diffexpo.cli.failures import boundary
from diffexpo.cli.rescore import rescore
from diffexpo.cli.run import run
from diffexpo.cli.runs import runs
from diffexpo.cli.stages import SINGLE_STAGES, cite, export, report, stage_command
from diffexpo.cli.tracking import track
from diffexpo.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Align text-to-image diffusion and flow-matching models with preferences, online.",
    epilog="Exit codes: 0 done, 1 a bound of --fail-below is not met, 2 usage or settings, 3 missing model, "
    "data or file, 4 failed, 75 interrupted and resumable, 76 waiting for people's votes.",
)
app.command("run")(run)
app.command("evaluate")(evaluate)
app.command("suites")(suites)
app.command("table")(table)
app.command("estimate")(estimate)
app.command("report")(report)
app.command("export")(export)
app.command("cite")(cite)
app.command("audit")(audit)
app.command("runs")(runs)
app.command("rescore")(rescore)
app.command("verify")(verify)
app.command("track")(track)
app.command("compare")(compare)
app.command("sweep")(sweep)
for stage, text in SINGLE_STAGES.items():
    app.command(stage, help=text, rich_help_panel="Single stages")(stage_command(stage))
app.add_typer(recipes.app, name="recipes")
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(improve.app, name="improve")
app.add_typer(label.app, name="label")
app.add_typer(rewards.app, name="rewards")
app.add_typer(study.app, name="study")
app.command("doctor")(doctor.doctor)
app.command("env")(doctor.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Align text-to-image diffusion and flow-matching models with preferences, online."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `diffexpo` script; ends the process with its exit code."""
    with boundary():
        app(arguments, prog_name="diffexpo")
