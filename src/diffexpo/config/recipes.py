"""Recipes by name: the embedded YAML files, and a user's own by path."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from diffexpo.errors import MissingError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One recipe: its name, its file, and the first line of its header."""

    name: str
    path: Path
    summary: str


def list_recipes() -> list[Recipe]:
    """The embedded recipes by name."""
    paths = sorted(RECIPES.rglob("*.yaml"))
    return [describe_recipe(path.relative_to(RECIPES).with_suffix("").as_posix(), path) for path in paths]


def describe_recipe(name: str, path: Path) -> Recipe:
    """A recipe of this name in a file, with what its first line says, if that is a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    summary = lines[0].lstrip("# ").strip() if lines and lines[0].startswith("#") else ""
    return Recipe(name, path, summary)


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: An embedded name (`emoji/expo`, with or without `.yaml`) or a path to a YAML file; a file that
            exists wins.
    Returns:
        The path of the file; `find_recipe("emoji/expo").name` is "expo.yaml".
    Raises:
        MissingError: neither; the nearest names are given.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    names = {recipe.name: recipe.path for recipe in list_recipes()}
    wanted = name.removesuffix(".yaml")
    if wanted in names:
        return names[wanted]
    if "=" in name:
        raise MissingError(f"no recipe {name!r}. Did you mean --set {name}? Settings come after --set")
    near = [known for known in names if known.rpartition("/")[2] == wanted.rpartition("/")[2]]
    near += [known for known in names if known.startswith(wanted)]
    near = list(dict.fromkeys([*near, *difflib.get_close_matches(wanted, names)]))
    hint = f"Did you mean {' or '.join(near[:3])}?" if near else f"Embedded recipes: {', '.join(names)}."
    raise MissingError(f"no recipe {name!r}: neither a file nor an embedded recipe. {hint}")


def origin_of(path: Path) -> str:
    """How messages name a recipe file: `recipe emoji/expo` if it is embedded, else its path."""
    absolute = path.resolve()
    if absolute.is_relative_to(RECIPES):
        return f"recipe {absolute.relative_to(RECIPES).with_suffix('').as_posix()}"
    return str(path)
