"""What the embedded worlds need at run time; `worlds/` of the repository holds the code that made them.

A world is a module of this package. It names its files and folders below `assets/<world>` in `ASSETS`, and
gives its lists of prompts, those of `LISTS`, with `prompts(name)`. Settings name either as `<world>:<name>`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from diffexpo.config.worlds import WORLDS, world_of
from diffexpo.errors import MissingError
from diffexpo.types import Prompt

if TYPE_CHECKING:
    import numpy as np

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def _module(world: str) -> ModuleType:
    return import_module(f"diffexpo.worlds.{world}")


def asset_path(world: str, name: str) -> Path:
    """The folder or file of what a world ships under a name.

    Raises:
        KeyError: the world ships nothing of that name; the message lists what it ships.
    """
    assets: dict[str, str] = _module(world).ASSETS
    if name not in assets:
        lists = ", ".join(_module(world).LISTS)
        expected = f"expected one of {', '.join(assets)}, or of its lists of prompts {lists}"
        raise KeyError(f"{world} asset {name!r} is unknown - {expected}")
    return _ASSETS / world / assets[name]


def local_path(path: str) -> str:
    """The folder or file behind `<world>:<name>`; any other path as it is.

    Raises:
        MissingError: the world ships nothing of that name; the message lists what it ships.
    """
    world = world_of(path)
    if world is None:
        return path
    try:
        return str(asset_path(world, path.partition(":")[2]))
    except KeyError as error:
        raise MissingError(f"there is no {path!r}: {error.args[0]}") from error


def embedded_prompts(source: str) -> list[Prompt] | None:
    """The prompts behind `<world>:<name>`; None if it names no list of prompts.

    Raises:
        KeyError: the world has no such list; the message says which it has.
    """
    world = world_of(source)
    found: list[Prompt] | None = None if world is None else _module(world).prompts(source.partition(":")[2])
    return found


def embedded_labelled(source: str) -> list[tuple[np.ndarray, Prompt]] | None:
    """The labelled images behind `<world>:<name>`, whose prompts' attributes say what they show; None if it
    names none."""
    world = world_of(source)
    give = None if world is None else getattr(_module(world), "labelled", None)
    return None if give is None else give(source.partition(":")[2])


def missing_assets() -> list[str]:
    """Names of embedded files and folders that are not where the package should have them."""
    named = [(world, name) for world in WORLDS for name in _module(world).ASSETS]
    return [f"{world}:{name}" for world, name in named if not asset_path(world, name).exists()]
