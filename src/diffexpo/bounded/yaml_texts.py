"""YAML of strangers: the scalars of YAML 1.2, unique keys, plain values, and bounds on its bytes, its depth
and its values, counted as often as aliases repeat them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from diffexpo.bounded.texts import UnreadableError, read_text, size_in_words
from diffexpo.errors import ConfigError

MAX_BYTES = 2**18
MAX_VALUES = 20_000
MAX_DEPTH = 32
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_PREFIX = "tag:yaml.org,2002:"

Value = bool | int | float | str | None | list["Value"] | dict[str, "Value"]


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2 (`off`, `16:9`, `2024-02-30` are words, `1e-5` a number), unique
    keys and no values but those that JSON has too."""

    yaml_implicit_resolvers: ClassVar = {
        first: [
            pair
            for pair in pairs
            if pair[0].removeprefix(_PREFIX) not in ("bool", "float", "int", "timestamp")
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_PREFIX) in _PLAIN
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = self._depth = self._deepest = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """Of a finished node, by its id: how many values it holds and how deep they go."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node within the bounds; an alias counts as all that it repeats."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                self._refuse("an alias stands within what it repeats; write out what is meant", event)
            size, height = self._sizes[id(node)]
            self._count(size, height, event)
            return node
        before, outer = self._num_values, self._deepest
        self._depth += 1
        self._deepest = self._depth
        self._count(1, 0, event)
        node = super().compose_node(parent, index)
        self._sizes[id(node)] = (self._num_values - before, self._deepest - self._depth + 1)
        self._depth -= 1
        self._deepest = max(outer, self._deepest)
        return node

    def _count(self, size: int, height: int, event: yaml.Event) -> None:
        self._num_values += size
        self._deepest = max(self._deepest, self._depth + height)
        if self._num_values > MAX_VALUES:
            self._refuse(
                f"more than {MAX_VALUES:,} values, those that aliases repeat included; write less", event
            )
        if self._deepest > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels; settings are never", event)

    def _refuse(self, problem: str, event: yaml.Event) -> None:
        raise yaml.composer.ComposerError(None, None, problem, event.start_mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        """A value; a scalar that is not of its kind, as `0x_` is no number, is told with its place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, OverflowError):
            kind = node.tag.removeprefix(_PREFIX)
            problem = f"{str(node.value)[:40]!r} is no {kind} that can be read; put text in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice in one group", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


FLOAT = (
    r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
    r"|\.(?:inf|Inf)|\.(?:nan|NaN))"
)
# As in YAML 1.1, without numbers to the base 60: there 16:9 is 969.
INT = r"[-+]?(?:0b[01_]+|0[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"
BOOL = r"(?:true|True|TRUE|false|False|FALSE)"
for tag, pattern, first in (
    ("bool", BOOL, "tTfF"),
    ("float", FLOAT, "-+0123456789."),
    ("int", INT, "-+0123456789"),
):
    _Loader.add_implicit_resolver(f"{_PREFIX}{tag}", re.compile(f"^{pattern}$"), list(first))


def parse_yaml(text: str, origin: str) -> Value:
    """Parse YAML safely.

    Args:
        text: YAML; `off`, `no`, `yes` stay words and `1e-5` is a float.
        origin: File or flag, for the message.
    Returns:
        Plain Python values; `parse_yaml("1e-5", "--set")` is the float 1e-05.
    Raises:
        ConfigError: not YAML, a key stands twice, or beyond a bound.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise ConfigError(f"{origin} is larger than {size_in_words(MAX_BYTES)}; expected settings in YAML")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_explain_yaml(error, text, origin)) from None


def read_yaml(path: Path, origin: str | None = None) -> Value:
    """`parse_yaml` of a file."""
    return parse_yaml(read_yaml_text(path), origin or str(path))


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; a ConfigError where it holds anything else."""
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected a YAML mapping of settings")
    return found


def read_yaml_text(path: Path) -> str:
    """The text of a YAML file; a ConfigError where there is none that can be read."""
    try:
        return read_text(path, MAX_BYTES)
    except UnreadableError as error:
        advice = "expected settings in YAML, saved as UTF-8"
        raise ConfigError(f"{path} cannot be read: it is {error}; {advice}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _explain_yaml(error: yaml.YAMLError, text: str, origin: str) -> str:
    """Where text is no YAML and why, with the line itself below."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{origin} is not valid YAML: {' '.join(str(error).split())}"
    problem = str(getattr(error, "problem", "") or getattr(error, "context", ""))
    lines = text.splitlines()
    number = min(mark.line, max(len(lines) - 1, 0))
    # of a long line what stands around the place
    start = max(0, mark.column - 60)
    shown = lines[number][start : start + 100] if lines else ""
    # what is not built as YAML is built; other problems say themselves what helps
    is_form = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError)
    advice = " (keys of one group begin in the same column, with spaces, and a colon is followed by a space)"
    where = f"{origin} is not valid YAML: line {number + 1}, column {mark.column + 1}"
    caret = f"{' ' * min(mark.column - start, len(shown))}^"
    return f"{where}: {problem}{advice if is_form else ''}\n    {shown}\n    {caret}"
