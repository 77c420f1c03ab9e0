"""`diffexpo evaluate`: models on a benchmark suite."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.options import AsJson
from diffexpo.cli.processes import is_first
from diffexpo.cli.progress import Console
from diffexpo.cli.stages import stage_command

if TYPE_CHECKING:
    from diffexpo.assembly import BenchmarkPlan

EVALUATIONS = Path("evaluations")
NOT_MET = 1


# Long because every option has its help.
# Many parameters because each is an option of the command.
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Model folder or hub id, BASE+LORA, RUN or RUN@2, folder of images; LABEL=...,guidance=2.5",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Suite; `diffexpo suites` lists them. Without one: a run's own evaluation.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the evaluation, instead of evaluations/SUITE."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", metavar="[NAME=]TYPE[:PATH]", help="One judge more. Repeatable."),
    ] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="Prompt file of the suite.")] = None,
    guidance: Annotated[
        str | None, typer.Option(metavar="LIST", help="Draw every model at each scale, e.g. 1,3,5,7.5.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="Model that the others are compared with; default: the first."),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Real images: adds Fréchet distance and CMMD.")
    ] = None,
    fail_below: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-below",
            metavar="NAME=VALUE",
            help="Exit code 1 if a model's win_rate, win_rate_low or a judge's total is lower. Repeatable.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the suite. Repeatable."),
    ] = None,
    show_trained: Annotated[
        bool, typer.Option("--show-trained", help="Show, marked, scores of judges that trained a model.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print what would be drawn and what it could see; write nothing."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or a device of torch.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Precision of models that are no runs.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Draw the same prompts with the same noise for all models, score them, and write one page.

    Only what is missing is drawn and scored: a model, a judge more costs itself alone, and after Ctrl-C the
    same command continues.

    \b
    diffexpo evaluate scenes:diffusion runs/scenes_expo --guidance 1,2.5 --suite scenes
    diffexpo evaluate base=scenes:diffusion,guidance=2.5 runs/scenes_expo@2 runs/scenes_expo@3 --suite scenes
    diffexpo evaluate stable-diffusion-v1-5/stable-diffusion-v1-5 mine=runs/mine --suite hpsv2
    diffexpo evaluate scenes:diffusion scenes:diffusion+lora.safetensors,scale=0.8 drawn/ --suite scenes
    """
    if suite is None:
        _next_evaluation(models or [], as_json, needs_suite=plan)
        return
    from diffexpo.config.entries import read_entries
    from diffexpo.config.suites import check_judges, read_judge, read_suite

    if not models:
        raise ConfigError(f"no model is given: expected diffexpo evaluate MODEL... --suite {suite}")
    asked = [*(overrides or ()), *([] if prompts is None else [f"prompts={json.dumps(prompts)}"])]
    chosen = read_suite(suite, asked)
    chosen = chosen.model_copy(update={"judges": (*chosen.judges, *map(read_judge, judge or ()))})
    check_judges(chosen.judges)
    console = Console(sys.stderr if as_json else None)
    wanted = assembly.Evaluating(
        suite=chosen,
        entries=read_entries(models, scales_of(guidance)),
        out=out or EVALUATIONS / chosen.name,
        device=device,
        dtype=dtype,
        shows_trained=show_trained,
        against=against,
        real=real,
        gates=tuple(fail_below or ()),
        command=shlex.join(["diffexpo", *sys.argv[1:]]),
    )
    if plan:
        _print_plan(assembly.plan_evaluation(wanted, console), console, as_json)
        return
    found = assembly.evaluate_models(wanted, console)
    console.line(f"report: {found.page}")
    if as_json and is_first():
        print(json.dumps(found.numbers, indent=2))
    for line in found.failures:
        typer.echo(f"below its bound: {line}", err=True)
    if found.failures:
        raise typer.Exit(NOT_MET)


def _next_evaluation(models: list[str], as_json: bool, *, needs_suite: bool) -> None:
    """Without a suite a run is meant, and its own evaluation; a ConfigError for what only a suite has."""
    if len(models) > 1 or needs_suite or any("=" in model for model in models):
        told = "1 model" if len(models) == 1 else f"{len(models)} models"
        raise ConfigError(f"{told} and no suite: expected --suite NAME, which `diffexpo suites` lists")
    stage_command("evaluate")(models[0] if models else None, as_json)


def _print_plan(found: BenchmarkPlan, console: Console, as_json: bool) -> None:
    """What would be drawn, what win rates it shows, and what models that are judged already need."""
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    rows: list[list[object]] = []
    for label, count in found.to_draw.items():
        minutes = found.minutes[label]
        rows.append([label, found.images, count, "-" if minutes is None else f"{minutes:.1f}"])
    told = f"{found.suite}: {found.prompts} prompts, {found.images_per_prompt} image(s) each"
    console.table(told, ["model", "images", "to draw", "minutes at the pace so far"], rows)
    several = "" if found.comparisons == 1 else f", {found.comparisons} comparisons sharing 5%"
    rates = [[one.prompts, _rate(one.rate), _rate(one.rate_half_tied)] for one in found.visible]
    columns = ["prompts", "without ties", "half of them tied"]
    console.table(f"smallest win rates that four of five evaluations show{several}", columns, rates)
    needs = ", ".join(f"{rate:.0%} by {count}" for rate, count in found.needed.items())
    console.line(f"a win rate without ties is shown by so many prompts: {needs}")
    if found.measured:
        rows = [
            [
                f"{one.model} / {one.against}",
                f"{one.rate:.1%}",
                f"{one.visible_rate:.1%}",
                one.rate_needs or "-",
                f"{one.difference:.4g}",
                f"{one.visible_difference:.4g}",
                one.difference_needs or "-",
            ]
            for one in found.measured
        ]
        columns = [
            "couple",
            "win rate",
            "visible",
            "prompts for it",
            "difference",
            "visible",
            "prompts for it",
        ]
        console.table(f"measured so far by {found.judge}", columns, rows)


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:.1%}"


def suites(as_json: AsJson = False) -> None:
    """List the benchmark suites, and where the prompts of those that are not shipped are published."""
    from diffexpo.config.suites import list_suites, read_suite

    found = {name: read_suite(name) for name in list_suites()}
    if as_json:
        print(json.dumps({name: suite.model_dump(mode="json") for name, suite in found.items()}, indent=2))
        return
    rows = [
        (
            name,
            one.title,
            ", ".join(judge.name for judge in one.judges),
            "shipped" if one.published is None else one.prompts,
        )
        for name, one in found.items()
    ]
    Console().table("suites", ["name", "what", "judges", "prompts"], rows)


def scales_of(text: str | None) -> list[float]:
    """Guidance scales with commas between; a ConfigError for anything else."""
    if text is None:
        return []
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = [-1.0]
    if any(not 0.0 <= scale < float("inf") for scale in scales):
        raise ConfigError(f"--guidance {text!r}: expected numbers from 0 with commas between, e.g. 1,3,5,7.5")
    return list(dict.fromkeys(scales))


def table(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="expo, improvement-1, improvement-2, improvement-3 or improvement-4."
        ),
    ],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER...", help="Evaluations to take; default: all in evaluations/."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a paper's table from the evaluations at hand, with intervals, beside the published numbers."""
    lines = assembly.paper_table(name, folders or assembly.evaluations_in(EVALUATIONS))
    print(json.dumps(lines) if as_json else "\n".join(lines))
