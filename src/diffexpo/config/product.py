"""Several values of a setting: `--set seed=0,1,2 --set algorithm.beta=500,1000` as six runs."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from diffexpo.errors import ConfigError

_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class Combination:
    """One choice of a value for every setting: a name made of those that vary, fit for a folder, and the
    `a.b=value` strings of `--set`."""

    name: str
    overrides: tuple[str, ...]


def combinations_of(overrides: Sequence[str]) -> list[Combination]:
    """The product of all values, the last setting varying fastest.

    Args:
        overrides: `a.b=value,value,...`; commas inside of brackets and quotes belong to a value.
    Returns:
        At least one; ["seed=0,1", "model.path=x"] gives "seed-0" and "seed-1". Where nothing varies the name
        is "run".
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
        found.append(Combination(name or "run", tuple(f"{key}={value}" for key, value in values.items())))
    names = Counter(one.name for one in found)
    return [
        Combination(f"{number}-{one.name}" if names[one.name] > 1 else one.name, one.overrides)
        for number, one in enumerate(found, start=1)
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
