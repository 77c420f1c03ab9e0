"""Settings in words: what each expects, what a wrong one should have been."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from diffexpo.config.methods import DEFAULT_METHOD, METHOD_BY_NAME
from diffexpo.config.rewards import RewardCard
from diffexpo.config.run import RunConfig

# The group whose settings depend on its `type`.
CHOICE = "algorithm"
MAX_TOLD = 20
"""Problems of one configuration that are told, each with what was probably meant."""
MAX_SHOWN = 400
"""Characters of a wrong value."""
# The origin of a value that nothing set.
DEFAULT = "default"


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
            yield from _walk_elements(_groups_in(field.annotation), f"{here}[]")


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


def _groups_in(kind: object) -> list[type[BaseModel]]:
    """The groups that a type names: those that an element of a list may be."""
    own = _as_group(kind)
    return [own] if own else [group for part in get_args(kind) for group in _groups_in(part)]


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
        return "a list of groups" if _groups_in(kind) else f"a list; each element {describe(arguments[0])}"
    bounds = _bounds(metadata) if kind in (int, float, str) else []
    text = WORDS.get(kind, "a group of settings") if isinstance(kind, type) else "a group of settings"
    return f"{text} {' and '.join(bounds)}".strip()


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
    return re.sub(r"\.\d+(?=\.|$)", "[]", path)


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
    ours = [setting.path for setting in settings() if setting.is_of(method)]
    tails = {known.rpartition(".")[2]: known for known in reversed(ours)}
    alike = difflib.get_close_matches
    near = (
        [f"{parent}.{key}".lstrip(".") for key in alike(name, siblings, n=1)]
        or [known for known in ours if known.rpartition(".")[2] == name]
        or alike(path, ours, n=1, cutoff=0.7)
        or [tails[tail] for tail in alike(name, tails, n=1, cutoff=0.75)]
    )
    if near:
        return f" Did you mean {' or '.join(dict.fromkeys(near[:3]))}?"
    where = f"{parent} has" if parent and siblings else "There are"
    return f" {where}: {', '.join(siblings or group_keys('', method))}."


def explain_errors(error: ValidationError, values: Mapping[str, object], sources: Mapping[str, str]) -> str:
    """A validation error as lines: path, value and origin, what was expected, what to do; the first ones, and
    how many there are besides."""
    lines: dict[str, str] = {}
    method = chosen_method(values) or DEFAULT_METHOD
    details = error.errors(include_url=False)
    for number, detail in enumerate(details):
        if len(lines) >= MAX_TOLD:
            lines["further"] = f"... and {len(details) - number} more problems; correct these first"
            break
        kind = str(detail["type"])
        whole, path, value = _locate(detail["loc"], values)
        if kind.startswith("union_tag") and isinstance(value, Mapping):
            whole = f"{whole}.type"
            # The validator stops at the type; names that no type has are found here.
            for inner in () if path == CHOICE else [f"{path}.{key}" for key in value][:MAX_TOLD]:
                if not is_setting(inner) and not group_keys(inner):
                    lines[inner] = _unknown_setting(inner, _origin(inner, sources), method)
            if "type" in value:
                path, value = f"{path}.type", value["type"]
            else:
                kind = "missing"
        origin = _origin(path, sources)
        if kind == "extra_forbidden":
            lines.setdefault(path, _unknown_setting(path, origin, method))
        elif kind == "missing":
            told = f"{whole} is not given (in {origin}): expected {expected_at(whole, method)}"
            lines.setdefault(whole, told)
        else:
            lines.setdefault(path, _wrong_value(path, value, origin, kind, method))
    return "\n".join(lines.values())


def _unknown_setting(path: str, origin: str, method: str | None) -> str:
    """The message on a key that is no setting, or one of another method only."""
    others = [name for name in METHOD_BY_NAME if name != method and is_setting(path, name)]
    if method is not None and others and not is_setting(path, method):
        return (
            f"{path} is not a setting of {method} (from {origin}): it belongs to {', '.join(others)}. Remove "
            f"it, or choose another {CHOICE}.type."
        )
    if is_setting(path, method):
        return f"{path} is a setting of another type than the one given there (from {origin}): remove it"
    return f"{path} is not a setting (from {origin}).{suggest_setting(path, method)}"


def _wrong_value(path: str, value: object, origin: str, kind: str, method: str | None) -> str:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    line = f"{path} = {shown} (from {origin}): expected {expected_at(path, method)}"
    setting = find_setting(path, method)
    if setting is not None and isinstance(value, str) and setting.expected.startswith("one of "):
        choices = setting.expected.removeprefix("one of ").split(", ")
        near = [choice for choice in choices if choice.casefold() == value.casefold()]
        near = near or [choice for choice in choices if value.casefold() in choice.split("_")]
        near = near or difflib.get_close_matches(value.casefold(), choices, n=1)
        return f"{line}. Did you mean {' or '.join(near)}?" if near else line
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return f"{line}; put it in quotes to make it text"
    if kind == "finite_number":
        return f"{line}, finite"
    return line


def _locate(loc: Sequence[str | int], values: Mapping[str, object]) -> tuple[str, str, object]:
    """Where an error is: its dotted path, as much of it as exists in the values, and what stands there.

    The `type` that the validator puts behind the group of a method or reward is left out.
    """
    here: Any = values
    typed: Any = None
    parts: list[str] = []
    found = 0
    for part in loc:
        if isinstance(here, Mapping) and part == here.get("type") and here is not typed:
            typed = here
            continue
        is_element = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if found == len(parts) and (is_element or (isinstance(here, Mapping) and part in here)):
            here = here[part]
            found += 1
        parts.append(str(part))
    return ".".join(parts), ".".join(parts[:found]), here


def _origin(path: str, sources: Mapping[str, str]) -> str:
    """The origin of a path; of a group, that of whatever set something in it."""
    named = [
        origin
        for leaf, origin in sources.items()
        if f"{leaf}.".startswith(f"{path}.") or path.startswith(f"{leaf}.")
    ]
    return named[-1] if named else DEFAULT
