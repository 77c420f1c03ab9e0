"""Training methods, one a file: a pure function on (B,) tensors and a small class that feeds it.

The file of a method is named like its `algorithm.type`, its class too (`flow_grpo`: `FlowGrpo`). Public
functions and classes of all of them can be imported from here; a file loads when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.types import Algorithm

# Files that hold parts of several methods.
_PARTS = ("safeguards",)


def algorithm_class(method: str) -> type[Algorithm]:
    """The class of a method by its `algorithm.type`."""
    name = "".join(part.capitalize() for part in method.split("_"))
    found: type[Algorithm] = getattr(import_module(f"diffexpo.algorithms.{method}"), name)
    return found


def _public(file: str) -> dict[str, object]:
    """Functions and classes that a file defines for others."""
    module = import_module(f"diffexpo.algorithms.{file}")
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and callable(value)
    }


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for file in (*METHOD_BY_NAME, *_PARTS):
            found = _public(file)
            if name in found:
                return found[name]
    raise AttributeError(f"module 'diffexpo.algorithms' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(name for file in (*METHOD_BY_NAME, *_PARTS) for name in _public(file))
