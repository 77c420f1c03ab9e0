"""From recipes, environment and flags to one checked RunConfig, with the origin of every value.

Layers are merged left to right: defaults, each recipe in the order given, all `DIFFEXPO_*` variables, all
`--set a.b=c`. Groups merge key by key; lists are replaced whole, or one element at a time (`--set
rewards.0.weight=2`). A layer that changes `algorithm.type` takes over, of what earlier layers set in that
group, only what means the same in both methods; what is left behind is named in a note. Defaults that are
data of an embedded world hold for that world's models only.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from diffexpo.bounded.yaml_texts import Value, parse_yaml, read_yaml
from diffexpo.config.explain import (
    CHOICE,
    DEFAULT,
    chosen_method,
    explain_errors,
    find_setting,
    group_keys,
    is_setting,
    suggest_setting,
)
from diffexpo.config.methods import METHOD_BY_NAME, same_meaning
from diffexpo.config.recipes import find_recipe, origin_of
from diffexpo.config.run import RunConfig
from diffexpo.config.worlds import world_of
from diffexpo.errors import ConfigError

ENV_PREFIX = "DIFFEXPO_"

NONE_OF_OTHERS = ("offline.source", "explore.negatives.source")
NAMED_BY_OTHERS = ("prompts.source", "evaluation.prompts")
"""Settings whose defaults are data of an embedded world: what they are with a model of somebody else."""


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and, for every leaf by dotted path, where its value comes from."""

    config: RunConfig
    sources: dict[str, str]
    notes: tuple[str, ...] = ()
    """What a layer set and a later one made void, one sentence each."""


def config_to_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as YAML, which any reader of YAML 1.1 reads alike; loading it again
    gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def load_config(
    recipes: Sequence[str | Path],
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Merge recipes, environment and overrides, and check the result.

    Args:
        recipes: Names of embedded recipes (`emoji/expo`) or YAML files, merged left to right.
        overrides: `a.b=value` strings of `--set`; the value is YAML (`[1, 2]`, `null`, `1e-5`).
        environment: Variables to read `DIFFEXPO_A__B=value` from; None takes the process environment, {}
            none.
    Returns:
        The configuration and the origin of every value. `load_config([], ["seed=3"], {})` has seed 3 from
        "--set seed=3" and every other value from "default".
    Raises:
        MissingError: no such recipe (the nearest names are given).
        ConfigError: unknown key, wrong type, value out of range or a combination that makes no sense.
    """
    merged = _Merged()
    for recipe in recipes:
        path = find_recipe(str(recipe))
        origin = origin_of(path)
        values = read_yaml(path, origin)
        if not isinstance(values, dict | None):
            found = type(values).__name__
            raise ConfigError(f"{origin} holds a {found}; expected a YAML mapping of settings")
        merged.merge(merged.values, values or {}, (), origin)
        merged.end_layer()
    for name, text in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(ENV_PREFIX):
            keys = name.removeprefix(ENV_PREFIX).lower().split("__")
            merged.set(keys, parse_yaml(text, name), name)
    merged.end_layer()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override!r} has no value; expected --set group.key=value")
        origin = f"--set {override}"
        keys = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")  # rewards[0].weight too
        merged.set(keys, parse_yaml(text, origin), origin)
    merged.end_layer()
    return merged.check()


def read_resolved(path: Path) -> LoadedConfig:
    """The configuration of an existing run (`config.yaml`), untouched by the environment."""
    return load_config([path], (), {})


class _Merged:
    """The values so far, and the origin of each leaf that is no default."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = RunConfig().model_dump(mode="json")
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self._method = chosen_method(self.values)
        self._touched: set[str] = set()

    def end_layer(self) -> None:
        """If the layer changed the method, keep of earlier layers' settings what means the same in both."""
        touched, self._touched = self._touched, set()
        before, after = self._method, chosen_method(self.values)
        # A type that is no method is left for the check to complain of.
        if before is None or after is None or before == after:
            return
        self._method = after
        old, new = METHOD_BY_NAME[before], METHOD_BY_NAME[after]
        group = self.values[CHOICE]
        assert isinstance(group, dict)
        for name in [name for name in group if name != "type"]:
            path = f"{CHOICE}.{name}"
            given = _within(path, self.sources)
            if _within(path, touched) or (given and same_meaning(old, new, name)):
                continue
            if given:
                shown = f"{path} = {group[name]!r} (from {self.sources[given[-1]]})"
                why = "means something else in" if is_setting(path, after) else "is no setting of"
                self.notes.append(f"{shown} was set for {before} and {why} {after}: it is not used")
            self._forget(path)
            del group[name]
        for name, value in new.model_validate({}).model_dump(mode="json").items():
            group.setdefault(name, value)

    def merge(
        self, target: dict[str, Value], values: Mapping[str, Value], at: Sequence[str], origin: str
    ) -> None:
        """Merge values into the group at a path, key by key."""
        for key, value in values.items():
            if not isinstance(key, str):
                told = f"{key!r} in {'.'.join(at) or 'the top level'} (from {origin}) is not a name"
                raise ConfigError(f"{told}; setting names are words")
            present = target.get(key)
            if isinstance(value, dict) and isinstance(present, dict):
                self.merge(present, value, (*at, key), origin)
            else:
                target[key] = value
                self._record(".".join((*at, key)), value, origin)

    def set(self, keys: Sequence[str], value: Value, origin: str) -> None:
        """Put one value at a dotted path; integers index lists."""
        group: Value = self.values
        for depth, key in enumerate(keys[:-1], 1):
            path = ".".join(keys[:depth])
            if isinstance(group, list):
                group = group[_index(group, keys[:depth], origin)]
                continue
            if not isinstance(group, dict):
                raise _not_a_group(keys, depth, origin)
            if key not in group and group_keys(path):
                group[key] = {}  # a group of a method that a later setting of this layer chooses
            if key not in group:
                raise ConfigError(f"{path} is not a setting (from {origin}).{suggest_setting(path)}")
            group = group[key]
        if isinstance(group, list):
            self._put_element(group, keys, value, origin)
        elif isinstance(group, dict):
            self.merge(group, {keys[-1]: value}, keys[:-1], origin)
        else:
            raise _not_a_group(keys, len(keys), origin)

    def _put_element(self, group: list[Value], keys: Sequence[str], value: Value, origin: str) -> None:
        index = _index(group, keys, origin)
        element = group[index]
        if isinstance(value, dict) and isinstance(element, dict):
            self.merge(element, value, keys, origin)
            return
        # A list of plain values has one origin, that of its newest element.
        is_plain = not any(isinstance(item, dict) for item in (value, *group))
        group[index] = value
        self._record(".".join(keys[:-1] if is_plain else keys), group if is_plain else value, origin)

    def _record(self, path: str, value: Value, origin: str) -> None:
        self._forget(path)
        names = [name for name, _ in leaves(value, path)]
        self.sources.update(dict.fromkeys(names, origin))
        self._touched.update(names)

    def _forget(self, path: str) -> None:
        for leaf in _within(path, self.sources):
            del self.sources[leaf]

    def check(self) -> LoadedConfig:
        """Validate; turn every complaint into a message with path, value, origin and what was expected."""
        _refuse_booleans_as_numbers(self.values, self.sources)
        _leave_embedded_data(self.values, self.sources)
        try:
            config = RunConfig.model_validate(self.values)
        except ValidationError as error:
            raise ConfigError(explain_errors(error, self.values, self.sources)) from None
        found = {path: self.sources.get(path, DEFAULT) for path, _ in leaves(config.model_dump(mode="json"))}
        return LoadedConfig(config, found, tuple(self.notes))


def _within(path: str, names: Iterable[str]) -> list[str]:
    """The names at a path and below it."""
    return [name for name in names if name == path or name.startswith(f"{path}.")]


def _index(group: list[Value], keys: Sequence[str], origin: str) -> int:
    """The last key as an index of a list."""
    if keys[-1].isdecimal() and int(keys[-1]) < len(group):
        return int(keys[-1])
    raise ConfigError(
        f"{'.'.join(keys)} (from {origin}) does not exist: {'.'.join(keys[:-1])} is a list of length "
        f"{len(group)}, counted from 0; set the whole list instead"
    )


def _not_a_group(keys: Sequence[str], depth: int, origin: str) -> ConfigError:
    parent = ".".join(keys[: depth - 1])
    kind = "is a single value" if is_setting(parent) else "is not a group"
    return ConfigError(
        f"{'.'.join(keys)} (from {origin}) cannot be set: {parent} {kind}, it holds no {keys[depth - 1]!r}"
    )


def leaves(value: Value, path: str = "") -> Iterable[tuple[str, Value]]:
    """Every leaf of nested settings as (dotted path, value); lists are leaves, except those of groups."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{index}")
    else:
        yield path, value


def _leave_embedded_data(values: dict[str, Value], sources: Mapping[str, str]) -> None:
    """Defaults that name an embedded world's data are for its own models: with another one there are no
    offline pairs, negative prompts and rewards, and prompts have to be named (a ConfigError)."""
    path = _value_at(values, "model.path")
    if not isinstance(path, str):
        return
    keys = [key for key in (*NONE_OF_OTHERS, *NAMED_BY_OTHERS) if key not in sources]
    worlds = {key: world_of(str(_value_at(values, key))) for key in keys}
    ours = [key for key, world in worlds.items() if world not in (None, world_of(path))]
    for key in ours:
        if key in NONE_OF_OTHERS:
            group = _value_at(values, key.rpartition(".")[0])
            assert isinstance(group, dict)
            group[key.rpartition(".")[2]] = None
    if not _within("rewards", sources) and any(world_of(path) != world for world in _reward_worlds(values)):
        values["rewards"] = []
    if missing := [key for key in ours if key in NAMED_BY_OTHERS]:
        what = " and ".join(missing)
        raise ConfigError(
            f"{what}: not given, and model.path = {path} (from {sources.get('model.path', DEFAULT)}) is no "
            "embedded model that the default prompts belong to; name prompt files, e.g. "
            + " ".join(f"--set {key}=FILE.txt" for key in missing)
        )


def _reward_worlds(values: Mapping[str, Value]) -> Iterable[str]:
    """The embedded worlds that rewards come from."""
    rewards = values.get("rewards")
    paths = (
        [reward.get("path") for reward in rewards if isinstance(reward, dict)]
        if isinstance(rewards, list)
        else []
    )
    return [world for path in paths if isinstance(path, str) and (world := world_of(path)) is not None]


def _value_at(values: Value, path: str) -> Value:
    """The value at a dotted path; None where a layer put something else than groups there."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _refuse_booleans_as_numbers(values: dict[str, Value], sources: Mapping[str, str]) -> None:
    # The validator would read `true` as the number 1.
    method = chosen_method(values)
    for path, value in leaves(values):
        setting = find_setting(path, method) if isinstance(value, bool) else None
        if setting is not None and "true or false" not in setting.expected:
            shown = f"{path} = {str(value).lower()} (from {sources.get(path, DEFAULT)})"
            raise ConfigError(f"{shown}: expected {setting.expected}")
