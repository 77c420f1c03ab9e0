"""`python -m worlds.emoji`: makes the embedded world again and measures how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Rebuild the embedded emoji world and measure it.")


@app.command()
def build(
    sources: Annotated[
        Path,
        typer.Argument(help="Folder with the unpacked image and label packages (docs/emoji.md names them)."),
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("images.parquet"),
) -> None:
    """Make the table of images and captions from the original packages."""
    from worlds.emoji.build import build_dataset

    print(f"{build_dataset(sources, out)} images: {out}")


@app.command()
def train(
    what: Annotated[
        str,
        typer.Argument(
            help="vae, decoder, judge_train, judge_heldout, step_judge, diffusion, flow, probe or offline."
        ),
    ],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("emoji-models"),
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
) -> None:
    """Train one part of the world for the given number of minutes."""
    from worlds.emoji.train import train as train_part

    train_part(what, minutes, out, seed)


@app.command()
def quality(
    out: Annotated[Path, typer.Option(help="Folder for the page and its images.")] = Path("emoji-quality"),
) -> None:
    """Measure reconstruction, retrieval, judge agreement and bias, and draw grids of images."""
    from worlds.emoji.quality import write_quality

    print(f"quality page: {write_quality(out)}")


@app.command("step-judge")
def step_judge(
    judge: Annotated[
        Path | None, typer.Option(help="Folder of a judge to measure instead of the shipped one.")
    ] = None,
    images: Annotated[int, typer.Option(min=50, help="Images of each kind.")] = 400,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts whose branches are finished.")] = 128,
) -> None:
    """Measure a step-aware judge: retrieval by noise level, and agreement on two branches of a step."""
    from worlds.emoji.measure_step_judge import load_step_judge, render

    print(render(load_step_judge(judge), images, prompts))


if __name__ == "__main__":
    from diffexpo.cli.failures import boundary

    with boundary():
        app(prog_name="python -m worlds.emoji")
