"""Settings in words: what each expects, what a wrong one should have been."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from pydantic import ValidationError

from diffexpo.config.methods import DEFAULT_METHOD, METHOD_BY_NAME
from diffexpo.config.rewards import REWARDS, RewardCard
from diffexpo.config.run import RunConfig

Json = dict[str, object]
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
        if "discriminator" in inner:
            _walk_choice(inner, root, here, text, found)
            continue
        found.append(Setting(here, describe(inner, root), default, text))
        for items in _groups_of_list(inner, root):
            _walk(items, root, f"{here}[]", None, found)


def _groups_of_list(node: Json, root: Json) -> list[Json]:
    """The group that each element of a list is, as one node; none if elements are plain values.

    Of groups told apart by `type` (rewards) the settings are taken together; `type` is one of all names.
    """
    items = _resolve(node.get("items", {}), root)
    if "discriminator" not in items:
        return [items] if "properties" in items else []
    options = [_resolve(option, root)["properties"] for option in items["oneOf"]]
    merged = {name: raw for properties in reversed(options) for name, raw in properties.items()}
    ordered = {name: merged[name] for properties in options for name in properties}
    names = [properties["type"]["const"] for properties in options]
    ordered["type"] = {"description": RewardCard.model_fields["type"].description, "enum": names}
    return [{"properties": ordered}]


def _walk_choice(node: Json, root: Json, path: str, text: str, found: list[Setting]) -> None:
    """The settings of every method; one that is the same in several is found once."""
    choice = f"{path}.type"
    default = node["default"]
    assert isinstance(default, dict)
    found.append(Setting(choice, f"one of {', '.join(METHOD_BY_NAME)}", default["type"], text))
    owners: dict[Setting, list[str]] = {}
    for method, settings_class in METHOD_BY_NAME.items():
        own: list[Setting] = []
        definition = _resolve({"$ref": f"#/$defs/{settings_class.__name__}"}, root)
        _walk(definition, root, path, None, own)
        for setting in own:
            if setting.path != choice:
                owners.setdefault(replace(setting, default=_hashable(setting.default)), []).append(method)
    found.extend(
        replace(setting, methods=() if len(methods) == len(METHOD_BY_NAME) else tuple(methods))
        for setting, methods in owners.items()
    )


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


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
    elements = node.get("prefixItems")
    if kind == "array" and isinstance(elements, list):
        return f"a list of {len(elements)}; each element {describe(elements[0], root)}"
    if kind == "array":
        if _groups_of_list(node, root):
            return "a list of groups"
        return f"a list; each element {describe(node.get('items', {}), root)}"
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
    prefix = f"{_generic(path)}" if path else ""
    names: dict[str, None] = {}
    for setting in settings():
        if not setting.is_of(method):
            continue
        if not prefix:
            names[setting.path.partition(".")[0].removesuffix("[]")] = None
        else:
            for head in (f"{prefix}.", f"{prefix}[]."):
                if setting.path.startswith(head):
                    names[setting.path.removeprefix(head).partition(".")[0].removesuffix("[]")] = None
    return list(names)


def suggest_setting(path: str, method: str | None = None) -> str:
    """ " Did you mean ...?" for an unknown dotted path: siblings first, then settings of that name
    anywhere."""
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
            missing = ".".join(str(part) for part in located)
            lines.setdefault(
                missing, f"{missing} is not given (in {origin}): expected {expected_at(missing, method)}"
            )
        else:
            lines.setdefault(path, _wrong_value(path, value, origin, kind, method))
    return "\n".join(lines.values())


def unknown_setting(path: str, origin: str, method: str | None) -> str:
    """The message on a key that is no setting, or one of another method only."""
    others = [name for name in METHOD_BY_NAME if name != method and is_setting(path, name)]
    if method is not None and others and not is_setting(path, method):
        return (
            f"{path} is not a setting of {method} (from {origin}): it belongs to {', '.join(others)}. "
            f"Remove it, or choose another {CHOICE}.type."
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
    """The dotted path that exists in the values (the validator adds the name of a union's branch) and its
    value."""
    here: object = values
    path: list[str] = []
    for part in _without_tag(loc):
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
