"""Several values of a setting: `--set seed=0,1,2 --set algorithm.beta=500,1000` as six runs."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from diffexpo.config.load import load_config
from diffexpo.config.run import RunConfig
from diffexpo.errors import ConfigError

_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class Combination:
    """One choice of a value for every setting: a name made of those that vary, fit for a folder, the name of
    its recipe, the `a.b=value` strings of `--set`, and all settings that they lead to."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    config: RunConfig


def load_product(recipes: Sequence[str], overrides: Sequence[str]) -> list[Combination]:
    """Every combination of some settings on top of recipes, checked, the last setting varying fastest.

    Args:
        recipes: Embedded recipes or YAML files, merged left to right, at least one.
        overrides: `a.b=value,value,...`: see `named_values`.
    Returns:
        At least one. A run is called as its recipe, or by `--set name=`, with the combination behind it.
    Raises:
        ConfigError: what `named_values` and `load_config` refuse, with the combination.
        MissingError: no such recipe.
    """
    if not recipes:
        raise ConfigError("no recipe given: expected an embedded recipe or a YAML file")
    found = []
    for name, own in named_values(overrides):
        try:
            whole = load_config(recipes, own).config
            config = load_config(recipes, [*own, f"name={json.dumps(f'{whole.name}-{name}')}"]).config
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        found.append(Combination(name, whole.name, own, config))
    return found


def named_values(overrides: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The product of all values, each with its name.

    Args:
        overrides: `a.b=value,value,...`; commas inside of brackets and quotes belong to a value.
    Returns:
        At least one; ["seed=0,1", "model.path=x"] gives ("seed-0", ("seed=0", "model.path=x")) and "seed-1".
        Where nothing varies the name is "run".
    Raises:
        ConfigError: no `=`, an empty value, a setting or a value twice, brackets that do not close.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise ConfigError(f"--set {override!r} has no value; expected --set group.key=value,value,...")
        if key in choices:
            raise ConfigError(f"--set {override!r}: {key} is set twice; write all its values in one --set")
        choices[key] = split_values(text, override)
    varying = [key for key, values in choices.items() if len(values) > 1]
    short = Counter(_last(key) for key in varying)
    found = []
    for chosen in product(*choices.values()):
        values = dict(zip(choices, chosen, strict=True))
        parts = [f"{_last(key) if short[_last(key)] == 1 else key}-{values[key]}" for key in varying]
        name = "_".join(re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in parts)
        found.append((name or "run", tuple(f"{key}={value}" for key, value in values.items())))
    names = Counter(name for name, _ in found)
    return [
        (f"{number}-{name}" if names[name] > 1 else name, own)
        for number, (name, own) in enumerate(found, start=1)
    ]


def split_values(text: str, shown: str) -> list[str]:
    """The values of a list with commas: split_values("1, [2, 3]", "") is ["1", "[2, 3]"]."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and depth == 0 and not quote:
            values.append("")
            continue
        if letter in _QUOTES and quote in ("", letter):
            quote = "" if quote else letter
        depth += 0 if quote else (letter in _OPEN) - (letter in _CLOSE)
        values[-1] += letter
    values = [value.strip() for value in values]
    if depth or quote:
        raise ConfigError(f"--set {shown!r}: a bracket or quote is not closed")
    if "" in values and len(values) > 1:
        raise ConfigError(f"--set {shown!r}: a value is empty; expected values with commas between them")
    if twice := [value for value, number in Counter(values).items() if number > 1]:
        raise ConfigError(f"--set {shown!r}: {twice[0]} stands there twice")
    return values


def _last(key: str) -> str:
    return key.rpartition(".")[2]
