"""Settings in words: what each expects, what a wrong one should have been."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from diffexpo.config.methods import DEFAULT_METHOD, METHOD_BY_NAME
from diffexpo.config.rewards import REWARDS, RewardCard
from diffexpo.config.run import RunConfig

# The group whose settings depend on its `type`.
CHOICE = "algorithm"


@dataclass(frozen=True)
class Setting:
    """One documented setting. `path` is dotted; `[]` stands for an index of a list of groups.

    `methods` names the values of `algorithm.type` that have it, if not all do. A path may occur twice: with
    another default or meaning under other methods.
    """

    path: str
    expected: str
    default: object
    text: str
    methods: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The path, with the methods that have it if not all do."""
        return f"{self.path} ({', '.join(self.methods)})" if self.methods else self.path

    def is_of(self, method: str | None) -> bool:
        """Whether a run with that method has it; None is any method."""
        return not self.methods or method is None or method in self.methods


@cache
def settings() -> tuple[Setting, ...]:
    """Every setting in the order of the schema, lists of groups and the settings of every method included."""
    return tuple(_walk(RunConfig, "", RunConfig().model_dump(mode="json")))


def _walk(group: type[BaseModel], path: str, defaults: Mapping[str, object] | None) -> Iterator[Setting]:
    """The settings of a group; `defaults` are the values it has within its parent, None: its fields' own."""
    for name, field in group.model_fields.items():
        here = f"{path}.{name}" if path else name
        default = _default(field) if defaults is None else defaults[name]
        text = " ".join((field.description or "").split())
        if field.discriminator is not None:
            yield from _walk_choice(here, default, text)
        elif inner := _as_group(field.annotation):
            yield from _walk(inner, here, default if isinstance(default, Mapping) else None)
        else:
            yield Setting(here, describe(field.annotation, field.metadata), default, text)
            yield from _walk_elements(_groups_of_list(field.annotation), f"{here}[]")


def _walk_elements(kinds: Sequence[type[BaseModel]], path: str) -> Iterator[Setting]:
    """The settings of a list's elements, taken together where `type` tells groups apart (rewards)."""
    found: dict[str, Setting] = {}
    for kind in kinds:
        for setting in _walk(kind, path, None):
            found.setdefault(setting.path, setting)
    if len(kinds) > 1:
        names = ", ".join(str(kind.model_fields["type"].default) for kind in kinds)
        text = " ".join((RewardCard.model_fields["type"].description or "").split())
        found[f"{path}.type"] = Setting(f"{path}.type", f"one of {names}", None, text)
    yield from found.values()


def _walk_choice(path: str, default: object, text: str) -> Iterator[Setting]:
    """The settings of every method; one that is the same in several is found once."""
    choice = f"{path}.type"
    assert isinstance(default, Mapping)
    yield Setting(choice, f"one of {', '.join(METHOD_BY_NAME)}", default["type"], text)
    owners: dict[Setting, list[str]] = {}
    for method, settings_class in METHOD_BY_NAME.items():
        for setting in _walk(settings_class, path, None):
            if setting.path != choice:
                owners.setdefault(replace(setting, default=_hashable(setting.default)), []).append(method)
    for setting, methods in owners.items():
        yield replace(setting, methods=() if len(methods) == len(METHOD_BY_NAME) else tuple(methods))


def _default(field: FieldInfo) -> object:
    """A field's own default as JSON; None if it has none."""
    default = field.get_default(call_default_factory=True)
    return None if default is PydanticUndefined else to_jsonable_python(default)


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_group(kind: object) -> type[BaseModel] | None:
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _groups_of_list(kind: object) -> list[type[BaseModel]]:
    """The groups that an element of this list may be; none if elements are plain values, or it is no list."""
    arguments = get_args(kind)
    if not arguments or get_origin(kind) not in (list, tuple):
        return []
    element = get_args(arguments[0])[0] if get_origin(arguments[0]) is Annotated else arguments[0]
    options = get_args(element) if get_origin(element) in (Union, UnionType) else (element,)
    return [group for option in options if (group := _as_group(option))]


WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def describe(kind: object, metadata: Sequence[object] = ()) -> str:
    """What a type with its bounds accepts, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        own = [bound for item in arguments[1:] for bound in getattr(item, "metadata", (item,))]
        return describe(arguments[0], [*own, *metadata])
    if origin is Literal:
        words = ", ".join(str(value) for value in arguments)
        return f"one of {words}" if len(arguments) > 1 else words
    if origin in (Union, UnionType):
        parts = [describe(option, metadata) for option in arguments]
        return " or ".join(part for part in parts if part != "null") + (" or null" if "null" in parts else "")
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}; each element {describe(arguments[0])}"
    if origin in (list, tuple):
        groups = _groups_of_list(kind)
        return "a list of groups" if groups else f"a list; each element {describe(arguments[0])}"
    bounds = _bounds(metadata) if kind in (int, float, str) else []
    text = WORDS.get(kind, "a group of settings") if isinstance(kind, type) else "a group of settings"
    return " ".join([text, " and ".join(bounds)]).strip()


def _bounds(metadata: Sequence[object]) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "matching"}
    return [
        f"{sign} {_number(value)}"
        for name, sign in signs.items()
        for item in metadata
        if (value := getattr(item, name, None)) is not None
    ]


def _number(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _generic(path: str) -> str:
    """`rewards.0.weight` as the schema writes it: `rewards[].weight`."""
    first, *others = path.split(".")
    return first + "".join("[]" if part.isdecimal() else f".{part}" for part in others)


def find_setting(path: str, method: str | None = None) -> Setting | None:
    """The setting at a dotted path (indices allowed), or None if there is none; of one method, or of any."""
    wanted = _generic(path)
    return next((setting for setting in settings() if setting.path == wanted and setting.is_of(method)), None)


def is_setting(path: str, method: str | None = None) -> bool:
    """Whether a dotted path names a single setting, of one method or of any."""
    return find_setting(path, method) is not None


def chosen_method(values: Mapping[str, object]) -> str | None:
    """The method that nested values name, or None if it is not one."""
    group = values.get(CHOICE)
    name = group.get("type") if isinstance(group, Mapping) else None
    return name if isinstance(name, str) and name in METHOD_BY_NAME else None


def expected_at(path: str, method: str | None = None) -> str:
    """What a path accepts, in words."""
    parent, _, last = path.rpartition(".")
    # An element of a list of plain values has no entry of its own.
    setting = find_setting(path, method) or (find_setting(parent, method) if last.isdecimal() else None)
    if setting is not None:
        return setting.expected
    keys = group_keys(path, method)
    return f"a group of settings ({', '.join(keys)})" if keys else "a setting"


def group_keys(path: str, method: str | None = None) -> list[str]:
    """Names directly inside a group, those of one method or of any; "" is the top level."""
    heads = (f"{_generic(path)}.", f"{_generic(path)}[].") if path else ("",)
    inside = [
        setting.path.removeprefix(head)
        for setting in settings()
        for head in heads
        if setting.is_of(method) and setting.path.startswith(head)
    ]
    return list(dict.fromkeys(rest.partition(".")[0].removesuffix("[]") for rest in inside))


def suggest_setting(path: str, method: str | None = None) -> str:
    """ " Did you mean ...?" for an unknown dotted path: siblings first, then settings of that name."""
    parent, _, name = path.rpartition(".")
    if ":" in name:
        key, _, value = name.partition(":")
        return f" YAML needs a space after the colon: {{{key}: {value}}}."
    siblings = group_keys(parent, method)
    ours = [setting for setting in settings() if setting.is_of(method)]
    near = [
        f"{parent}.{key}" if parent else key
        for key in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    ]
    if not near:
        near = [setting.path for setting in ours if setting.path.rpartition(".")[2] == name]
    if not near:
        near = difflib.get_close_matches(path, [setting.path for setting in ours], n=1, cutoff=0.7)
    if not near:
        tails = {setting.path.rpartition(".")[2]: setting.path for setting in reversed(ours)}
        near = [tails[tail] for tail in difflib.get_close_matches(name, tails, n=1, cutoff=0.75)]
    if near:
        return f" Did you mean {' or '.join(dict.fromkeys(near[:3]))}?"
    where = f"{parent} has" if parent and siblings else "There are"
    return f" {where}: {', '.join(siblings or group_keys('', method))}."


def explain_errors(error: ValidationError, values: Mapping[str, object], sources: Mapping[str, str]) -> str:
    """A validation error as lines: path, value and origin, what was expected, what to do."""
    lines: dict[str, str] = {}
    method = chosen_method(values) or DEFAULT_METHOD
    for detail in error.errors(include_url=False):
        kind = str(detail["type"])
        path, value = _locate(detail["loc"], values)
        located = _without_tag(detail["loc"])
        if kind.startswith("union_tag") and isinstance(value, Mapping):
            located = [*located, "type"]
            # The validator stops at the type; names that no type has are found here.
            for key in () if path == CHOICE else map(str, value):
                if key not in group_keys(path):
                    inner = f"{path}.{key}"
                    lines[inner] = unknown_setting(inner, _origin(inner, sources), method)
            kind = kind if "type" in value else "missing"
            path, value = (f"{path}.type", value["type"]) if "type" in value else (path, None)
        origin = _origin(path, sources)
        if kind == "extra_forbidden":
            lines.setdefault(path, unknown_setting(path, origin, method))
        elif kind == "missing":
            missing = ".".join(map(str, located))
            told = f"{missing} is not given (in {origin}): expected {expected_at(missing, method)}"
            lines.setdefault(missing, told)
        else:
            lines.setdefault(path, _wrong_value(path, value, origin, kind, method))
    return "\n".join(lines.values())


def unknown_setting(path: str, origin: str, method: str | None) -> str:
    """The message on a key that is no setting, or one of another method only."""
    others = [name for name in METHOD_BY_NAME if name != method and is_setting(path, name)]
    if method is not None and others and not is_setting(path, method):
        return (
            f"{path} is not a setting of {method} (from {origin}): it belongs to {', '.join(others)}. Remove "
            f"it, or choose another {CHOICE}.type."
        )
    return f"{path} is not a setting (from {origin}).{suggest_setting(path, method)}"


def _wrong_value(path: str, value: object, origin: str, kind: str, method: str | None) -> str:
    shown = "null" if value is None else repr(value)
    line = f"{path} = {shown} (from {origin}): expected {expected_at(path, method)}"
    setting = find_setting(path, method)
    if setting is not None and isinstance(value, str) and setting.expected.startswith("one of "):
        choices = setting.expected.removeprefix("one of ").split(", ")
        near = difflib.get_close_matches(value, choices, n=1)
        return f"{line}. Did you mean {near[0]}?" if near else line
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f"{line}; put it in quotes to make it text"
    if kind == "finite_number":
        return f"{line}, finite"
    return line


def _locate(loc: Sequence[str | int], values: Mapping[str, object]) -> tuple[str, object]:
    """The dotted path that exists in the values (the validator adds a union's branch), and its value."""
    here: Any = values
    path: list[str] = []
    for part in _without_tag(loc):
        is_element = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if not is_element and not (isinstance(here, Mapping) and part in here):
            break
        here = here[part]
        path.append(str(part))
    return ".".join(path), here


def _without_tag(loc: Sequence[str | int]) -> list[str | int]:
    """A location without the `type` of a method or reward, which the validator puts behind the group."""
    parts = list(loc)
    if parts[:1] == [CHOICE] and parts[1:2] and parts[1] in METHOD_BY_NAME:
        return [CHOICE, *parts[2:]]
    element = next((place for place, part in enumerate(parts) if isinstance(part, int)), len(parts))
    is_reward = parts[:element] in (["rewards"], ["evaluation", "judges"])
    if is_reward and parts[element + 1 : element + 2] and parts[element + 1] in REWARDS:
        return [*parts[: element + 1], *parts[element + 2 :]]
    return parts


def _origin(path: str, sources: Mapping[str, str]) -> str:
    """The origin of a path; of a group, that of whatever set something in it."""
    if path in sources:
        return sources[path]
    inside = [origin for leaf, origin in sources.items() if leaf.startswith(f"{path}.")]
    above = [origin for leaf, origin in sources.items() if path.startswith(f"{leaf}.")]
    named = [origin for origin in [*inside, *above] if origin != "default"]
    return named[-1] if named else "default"
