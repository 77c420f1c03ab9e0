"""`diffexpo emoji`: how the embedded world was made, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Rebuild the embedded emoji world and measure it.")


@app.command()
def build(
    sources: Annotated[
        Path,
        typer.Argument(
            help="Folder with the unpacked picture and label packages (docs/emoji.md names them)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("images.parquet"),
) -> None:
    """Make the picture and caption table from the original packages."""
    from diffexpo.emoji.build import build_dataset

    rows = build_dataset(sources, out)
    print(f"{rows} pictures: {out}")


@app.command()
def train(
    what: Annotated[
        str,
        typer.Argument(
            help="vae, judge_train, judge_heldout, step_judge, diffusion, flow, probe or offline."
        ),
    ],
    minutes: Annotated[float, typer.Option(min=0.01, help="Training time.")] = 10.0,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("emoji-models"),
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
) -> None:
    """Train one part of the world for so many minutes."""
    from diffexpo.emoji.train import train as train_part

    train_part(what, minutes, out, seed)


@app.command()
def quality(
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("emoji-quality"),
) -> None:
    """Measure reconstruction, retrieval, judge agreement and bias, and draw the picture grids."""
    from diffexpo.emoji.quality import write_quality

    print(f"quality page: {write_quality(out)}")


@app.command("step-judge")
def step_judge(
    judge: Annotated[Path | None, typer.Option(help="Folder of another judge than the shipped one.")] = None,
    pictures: Annotated[int, typer.Option(min=50, help="Pictures of each kind.")] = 400,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts whose branches are finished.")] = 128,
) -> None:
    """Measure a step-aware judge: retrieval by noise level, and agreement on two branches of a step."""
    from diffexpo.emoji.measure_step_judge import load_step_judge, render

    print(render(load_step_judge(judge), pictures, prompts))
