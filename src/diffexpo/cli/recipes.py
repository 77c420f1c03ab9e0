"""`diffexpo recipes`: the embedded recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from diffexpo.cli.progress import Console

app = typer.Typer(invoke_without_command=True, help="List the embedded recipes, or show one.")


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the embedded recipes, or show one."""
    if context.invoked_subcommand is not None:
        return
    from diffexpo.config import list_recipes

    console = Console(interactive=False)
    rows = [(recipe.name, recipe.summary) for recipe in list_recipes()]
    console.table("embedded recipes", ["name", "what"], rows)
    console.line("start one with `diffexpo run NAME`; copy one with `diffexpo recipes show NAME > my.yaml`")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of an embedded recipe, or a file.")],
) -> None:
    """Print a recipe as it is written, comments included."""
    from diffexpo.config import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")
