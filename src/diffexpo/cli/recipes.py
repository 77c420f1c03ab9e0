"""`diffexpo recipes`: the embedded recipes."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from diffexpo.cli.completing import recipe_names
from diffexpo.cli.options import AsJson
from diffexpo.cli.progress import Console

if TYPE_CHECKING:
    from diffexpo.config.recipes import Recipe

app = typer.Typer(invoke_without_command=True, help="List the embedded recipes, or show one.")


@app.callback()
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the embedded recipes, or show one."""
    if context.invoked_subcommand is not None:
        return
    from diffexpo.config import list_recipes

    found = sorted(list_recipes(), key=lambda recipe: (_rank(recipe.name), recipe.name))
    if as_json:
        print(json.dumps([_facts(one) for one in found], indent=2))
        return
    console, width = Console(interactive=False), max(shutil.get_terminal_size((100, 24)).columns, 40)
    column = max(len(recipe.name) for recipe in found) + 2
    is_narrow = width - column < 40  # the summary stands below the name then
    indent = 6 if is_narrow else column + 2
    console.line("embedded recipes")
    for recipe in found:
        lines = textwrap.wrap(recipe.summary, width - indent, break_long_words=False, break_on_hyphens=False)
        first = "" if is_narrow else "".join(lines[:1])
        console.line(f"  {recipe.name:<{column}}{first}".rstrip())
        for line in lines[not is_narrow :]:
            console.line(f"{' ' * indent}{line}")
    console.line("start one with `diffexpo run NAME`; copy one with `diffexpo recipes show NAME > my.yaml`")


def _rank(name: str) -> tuple[int, int]:
    """Where a recipe stands: a first look and the main method come first, the papers' settings last."""
    world, _, short = name.partition("/")
    first = ("quick", "expo")
    worlds = ("scenes", "emoji", "paper")
    place = worlds.index(world) if world in worlds else len(worlds)
    return place, first.index(short) if short in first else len(first)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="Name of an embedded recipe, or a file.", autocompletion=recipe_names
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Print a recipe as it is written, comments included."""
    from diffexpo.bounded.yaml_texts import parse_yaml, read_yaml_text
    from diffexpo.config import find_recipe
    from diffexpo.config.recipes import describe_recipe

    path = find_recipe(name)
    text = read_yaml_text(path)
    if as_json:
        settings = parse_yaml(text, str(path)) or {}
        print(json.dumps(_facts(describe_recipe(name, path)) | {"settings": settings}, indent=2))
        return
    print(text, end="")


def _facts(recipe: Recipe) -> dict[str, str]:
    """What JSON says of a recipe."""
    return {"name": recipe.name, "what": recipe.summary, "file": str(recipe.path)}
