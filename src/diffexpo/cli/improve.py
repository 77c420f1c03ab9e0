"""`diffexpo improve`: the improvement model of a run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from diffexpo import assembly
from diffexpo.assembly import ConfigError
from diffexpo.cli.failures import working_on
from diffexpo.cli.options import AsJson, Run
from diffexpo.cli.progress import Console
from diffexpo.cli.stages import stage_command

app = typer.Typer(no_args_is_help=True, help="The improvement model of an improvement_dpo run.")
TRAIN = "Train the run's improvement model on the offline pairs; continues at the last checkpoint."
app.command("train", help=TRAIN)(stage_command("improver"))
app.command("draw", help="Improve the images of the next collected iteration.")(stage_command("improve"))


@app.command()
def sweep(
    run: Run = None,
    text: Annotated[str, typer.Option(metavar="LIST", help="Text scales, with commas.")] = "1,3.5,7",
    image: Annotated[str, typer.Option(metavar="LIST", help="Image scales, with commas.")] = "1,3",
    prompts: Annotated[int, typer.Option(min=1, help="Rows of the image.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Improve a few images at every pair of guidance scales: the run's eval/improver_sweep.png and .json."""
    with working_on(run) as run_dir:
        scales = {"text_scales": _numbers(text, "--text"), "image_scales": _numbers(image, "--image")}
        done = assembly.sweep(run_dir, num_prompts=prompts, **scales)
        if as_json:
            print(json.dumps(done))
            return
        console = Console()
        for line in done["scales"]:
            console.line(line)
        console.line(f"saved {done['picture']} and {done['numbers']}")


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers with commas between, e.g. 1,3.5,7") from None
