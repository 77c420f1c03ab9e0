"""`python -m worlds.scenes`: makes the world of scenes again and measures how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Rebuild the embedded world of scenes and measure it.")
Models = Annotated[Path, typer.Option(help="Folder of the models.")]


@app.command()
def sprites(out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("scenes-sprites")) -> None:
    """Make the sheets of sprites from the single emoji."""
    from worlds.scenes.build import build_sprites

    build_sprites(out)
    print(f"sprites: {out}")


@app.command()
def train(
    what: Annotated[
        str,
        typer.Argument(
            help="decoder, checker_train, checker_heldout, looks_train, looks_heldout, reader, diffusion or "
            "flow."
        ),
    ],
    steps: Annotated[int, typer.Argument(min=1, help="Updates; a run that was stopped goes on.")],
    out: Models = Path("scenes-models"),
    vae: Annotated[
        Path | None, typer.Option(help="Folder of the autoencoder to use or to go on with.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Base whose weights are taken as a start.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Diffusion base that the flow base is distilled from.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak rate of a base, by default 8e-4 or, of flow, 1.5e-3; lower with --start."),
    ] = None,
) -> None:
    """Train one part of the world."""
    from worlds.scenes.train import train as train_part

    train_part(what, steps, out, seed, vae, start, teacher, learning_rate)


@app.command()
def average(
    first: Annotated[Path, typer.Argument(help="Folder of a base.")],
    second: Annotated[Path, typer.Argument(help="Folder of a base that was trained on from it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the second one.")] = 0.3,
) -> None:
    """Average the weights of two bases."""
    from worlds.scenes.average import average_bases

    average_bases(first, second, share, out)
    print(f"base: {out}")


@app.command()
def quality(
    base: Annotated[Path, typer.Argument(help="Folder of a base.")],
    checkers: Annotated[Path, typer.Option(help="Folder with both checkers.")] = Path("scenes-models"),
    out: Annotated[Path, typer.Option(help="Folder for the figures and grids.")] = Path("scenes-quality"),
    prompts: Annotated[int, typer.Option(min=20, help="Held-out prompts.")] = 500,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler; by default 10, of the flow base 8.")
    ] = None,
) -> None:
    """Measure the checkers on true images and a base under the checkers, and draw grids."""
    from worlds.scenes.quality import write_quality

    print(f"quality: {write_quality(base, checkers, out, prompts, steps)}")


@app.command()
def looks(
    judges: Annotated[Path, typer.Option(help="Folder with both judges of looks.")] = Path("scenes-models"),
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("scenes-quality"),
    scenes: Annotated[int, typer.Option(min=2, help="Held-out scenes of each comparison.")] = 100,
    base: Annotated[Path | None, typer.Option(help="Base that draws; by default the shipped one.")] = None,
    checker: Annotated[
        Path | None, typer.Option(help="Checker that says what is right; by default the held-out one.")
    ] = None,
) -> None:
    """Measure the judges of looks: by kind of damage, against each other, and whether correctness matters."""
    from worlds.scenes.quality_looks import write_looks

    print(f"looks: {write_looks(judges, out, scenes, base, checker)}")


@app.command()
def offline(
    out: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("scenes-offline.parquet"),
    base: Annotated[Path | None, typer.Option(help="Base that draws; by default the shipped one.")] = None,
    checker: Annotated[
        Path | None, typer.Option(help="Checker that labels; by default the shipped training checker.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Training prompts, three pairs each.")] = 340,
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
) -> None:
    """Draw and label the offline preference pairs."""
    from worlds.scenes.offline import make_offline

    facts = make_offline(out, seed, num_prompts=prompts, base=base, checker=checker)
    print(f"{facts}: {out}, {out.stat().st_size:,} bytes")


@app.command()
def pictures(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run on scenes.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("scenes-pictures.png"),
    versions: Annotated[
        str, typer.Option(help="Evaluations side by side, by name and separated by commas.")
    ] = "base,base-2.5,last",
    prompts: Annotated[int, typer.Option(min=1, help="How many of the run's prompts, in its order.")] = 24,
    columns: Annotated[int, typer.Option(min=1, help="Prompts in a row.")] = 3,
) -> None:
    """Draw what a run changed: each prompt's images before and after, framed by what the judge says."""
    from worlds.scenes.pictures import write_pictures

    print(f"pictures: {write_pictures(run, out, versions.split(','), prompts, columns)}")


if __name__ == "__main__":
    from diffexpo.cli.failures import boundary

    with boundary():
        app(prog_name="python -m worlds.scenes")
