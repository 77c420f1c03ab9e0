"""Settings in words: what each expects, what a wrong one should have been."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pydantic import ValidationError

from diffexpo.config.schema import RunConfig

Json = dict[str, object]


@dataclass(frozen=True)
class Setting:
    """One documented setting. `path` is dotted; `[]` stands for an index of a list of groups."""

    path: str
    expected: str
    default: object
    text: str


@cache
def settings() -> tuple[Setting, ...]:
    """Every setting in the order of the schema, lists of groups included."""
    schema = RunConfig.model_json_schema()
    defaults = RunConfig().model_dump(mode="json")
    found: list[Setting] = []
    _walk(schema, schema, "", defaults, found)
    return tuple(found)


def _resolve(node: Json, root: Json) -> Json:
    """The node itself, or what its $ref points to, keeping the node's own description."""
    name = node.get("$ref")
    if not isinstance(name, str):
        return node
    definitions = root["$defs"]
    assert isinstance(definitions, dict)
    return {
        **definitions[name.rpartition("/")[2]],
        **{key: node[key] for key in ("description",) if key in node},
    }


def _walk(node: Json, root: Json, path: str, defaults: object, found: list[Setting]) -> None:
    properties = node.get("properties", {})
    assert isinstance(properties, dict)
    for name, raw in properties.items():
        inner = _resolve(raw, root)
        here = f"{path}.{name}" if path else name
        default = defaults.get(name, raw.get("default")) if isinstance(defaults, dict) else raw.get("default")
        if "properties" in inner:
            _walk(inner, root, here, default, found)
            continue
        text = " ".join(str(raw.get("description", "")).split())
        found.append(Setting(here, describe(inner, root), default, text))
        items = _resolve(inner.get("items", {}), root)
        if "properties" in items:
            _walk(items, root, f"{here}[]", None, found)


def describe(node: Json, root: Json) -> str:
    """What a JSON schema node accepts, in words."""
    node = _resolve(node, root)
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(str(value) for value in node["enum"])
    if "anyOf" in node:
        parts = [describe(option, root) for option in node["anyOf"]]
        return " or ".join(part for part in parts if part != "null") + (" or null" if "null" in parts else "")
    kind = node.get("type")
    if kind == "array":
        items = _resolve(node.get("items", {}), root)
        return (
            "a list of groups" if "properties" in items else f"a list; each element {describe(items, root)}"
        )
    words = {
        "integer": "an integer",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    text = words.get(str(kind), "a group of settings")
    return " ".join([text, " and ".join(_bounds(node))]).strip()


def _bounds(node: Json) -> list[str]:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(node[key])}" for key, sign in signs.items() if key in node]
    if "pattern" in node:
        bounds.append(f"matching {node['pattern']}")
    return bounds


def _number(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _generic(path: str) -> str:
    """`rewards.0.weight` as the schema writes it: `rewards[].weight`."""
    out: list[str] = []
    for part in path.split("."):
        if part.isdecimal() and out:
            out[-1] += "[]"
        else:
            out.append(part)
    return ".".join(out)


def find_setting(path: str) -> Setting | None:
    """The setting at a dotted path (indices allowed), or None if there is none."""
    wanted = _generic(path)
    return next((setting for setting in settings() if setting.path == wanted), None)


def is_setting(path: str) -> bool:
    """Whether a dotted path names a single setting."""
    return find_setting(path) is not None


def expected_at(path: str) -> str:
    """What a path accepts, in words."""
    setting = find_setting(path)
    if setting is not None:
        return setting.expected
    keys = group_keys(path)
    return f"a group of settings ({', '.join(keys)})" if keys else "a setting"


def group_keys(path: str) -> list[str]:
    """Names directly inside a group; "" is the top level."""
    prefix = f"{_generic(path)}" if path else ""
    names: dict[str, None] = {}
    for setting in settings():
        if not prefix:
            names[setting.path.partition(".")[0].removesuffix("[]")] = None
        else:
            for head in (f"{prefix}.", f"{prefix}[]."):
                if setting.path.startswith(head):
                    names[setting.path.removeprefix(head).partition(".")[0].removesuffix("[]")] = None
    return list(names)


def suggest_setting(path: str) -> str:
    """ " Did you mean ...?" for an unknown dotted path: siblings first, then settings of that name anywhere."""
    parent, _, name = path.rpartition(".")
    siblings = group_keys(parent)
    near = [
        f"{parent}.{key}" if parent else key
        for key in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    ]
    if not near:
        near = [setting.path for setting in settings() if setting.path.rpartition(".")[2] == name]
    if not near:
        everything = [setting.path for setting in settings()]
        near = difflib.get_close_matches(path, everything, n=1, cutoff=0.7)
    if not near:
        tails = {setting.path.rpartition(".")[2]: setting.path for setting in reversed(settings())}
        near = [tails[tail] for tail in difflib.get_close_matches(name, tails, n=1, cutoff=0.75)]
    if near:
        return f" Did you mean {' or '.join(near[:3])}?"
    where = f"{parent} has" if parent and siblings else "There are"
    return f" {where}: {', '.join(siblings or group_keys(''))}."


def explain_errors(error: ValidationError, values: Mapping[str, object], sources: Mapping[str, str]) -> str:
    """A validation error as lines: path, value and origin, what was expected, what to do."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, value = _locate(detail["loc"], values)
        origin = _origin(path, sources)
        if detail["type"] == "extra_forbidden":
            lines.setdefault(path, f"{path} is not a setting (from {origin}).{suggest_setting(path)}")
        elif detail["type"] == "missing":
            missing = ".".join(str(part) for part in detail["loc"])
            lines.setdefault(
                missing, f"{missing} is not given (in {origin}): expected {expected_at(missing)}"
            )
        else:
            lines.setdefault(path, _wrong_value(path, value, origin, str(detail["type"])))
    return "\n".join(lines.values())


def _wrong_value(path: str, value: object, origin: str, kind: str) -> str:
    shown = "null" if value is None else repr(value)
    line = f"{path} = {shown} (from {origin}): expected {expected_at(path)}"
    setting = find_setting(path)
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
    """The dotted path that exists in the values (the validator adds the name of a union's branch) and its value."""
    here: object = values
    path: list[str] = []
    for part in loc:
        if (
            isinstance(here, Mapping)
            and part in here
            or isinstance(here, list)
            and isinstance(part, int)
            and part < len(here)
        ):
            here = here[part]
        else:
            break
        path.append(str(part))
    return ".".join(path), here


def _origin(path: str, sources: Mapping[str, str]) -> str:
    """The origin of a path; of a group, that of whatever set something in it."""
    if path in sources:
        return sources[path]
    inside = [origin for leaf, origin in sources.items() if leaf.startswith(f"{path}.")]
    above = [origin for leaf, origin in sources.items() if path.startswith(f"{leaf}.")]
    named = [origin for origin in [*inside, *above] if origin != "default"]
    return named[-1] if named else "default"
