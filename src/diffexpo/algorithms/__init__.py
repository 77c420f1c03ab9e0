"""Training methods, one a file: a pure function on (B,) tensors and a small class that feeds it.

The file of a method is named like its `algorithm.type`, its class too (`flow_grpo`: `FlowGrpo`). Public
functions and classes of all of them can be imported from here; a file loads when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.types import Algorithm

# Files that hold parts of several methods.
_PARTS = ("safeguards",)


class _Algorithms(Mapping[str, type[Algorithm]]):
    """The class of each method by its `algorithm.type`."""

    def __getitem__(self, name: str) -> type[Algorithm]:
        if name not in METHOD_BY_NAME:
            raise KeyError(name)
        algorithm: type[Algorithm] = vars(_module(name))[class_name(name)]
        return algorithm

    def __iter__(self) -> Iterator[str]:
        return iter(METHOD_BY_NAME)

    def __len__(self) -> int:
        return len(METHOD_BY_NAME)


ALGORITHMS: Mapping[str, type[Algorithm]] = _Algorithms()


def class_name(method: str) -> str:
    """Name of a method's class: `class_name("flow_grpo")` is "FlowGrpo"."""
    return "".join(part.capitalize() for part in method.split("_"))


def _module(name: str) -> ModuleType:
    return import_module(f"diffexpo.algorithms.{name}")


def _public(module: ModuleType) -> dict[str, object]:
    """Functions and classes that a file defines for others."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and callable(value)
    }


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for method in (*METHOD_BY_NAME, *_PARTS):
            found = _public(_module(method))
            if name in found:
                return found[name]
    raise AttributeError(f"module 'diffexpo.algorithms' has no attribute {name!r}")


def __dir__() -> list[str]:
    names = {name for method in (*METHOD_BY_NAME, *_PARTS) for name in _public(_module(method))}
    return sorted({"ALGORITHMS", *names})
