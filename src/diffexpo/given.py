"""Functions, prompts and settings of a Python session as what a recipe can name.

A run is repeated and resumed from its settings alone, so what a session hands over is written to files whose
names hold a hash of their content: the same function or list is the same file, another one is another run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from diffexpo.errors import ConfigError
from diffexpo.files import write_text
from diffexpo.types import Prompt

FOLDER = "given"


def path_of_function(function: Callable[..., object], folder: Path) -> str:
    """`file.py:name` of a function: its own file where that can be imported, else a copy of its source.

    Args:
        function: One with a name at the top level of a module, script or notebook.
        folder: Where copies go.
    Returns:
        What `path` of a `python` reward or loss takes.
    Raises:
        ConfigError: a lambda, method or inner function, one without source, or one that uses variables of its
            script or notebook: a copy would not have them.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(function, FunctionType) or "<" in function.__qualname__ or "." in function.__qualname__:
        raise ConfigError(
            f"{name!r} is no function of its own name: expected one that `def` defines outside of classes "
            "and other functions, so that the run can find it again when it is resumed"
        )
    module = sys.modules.get(function.__module__)
    file = getattr(module, "__file__", None)
    if function.__module__ != "__main__" and file is not None and str(file).endswith(".py"):
        return f"{Path(file).resolve()}:{name}"
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise ConfigError(f"{name!r}: its source cannot be read; define it in a file") from None
    text = _imports(function, name) + "\n\n" + source
    return f"{_written(folder, name, '.py', text)}:{name}"


def _imports(function: FunctionType, name: str) -> str:
    """Lines that import the modules which a function uses; a ConfigError for anything else of its script."""
    lines = ["from __future__ import annotations", ""]
    for used in sorted(_names(function)):
        value = function.__globals__.get(used)
        if isinstance(value, ModuleType):
            lines.append(f"import {value.__name__} as {used}")
        elif used in function.__globals__ and used != name:
            home, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
            if isinstance(home, str) and home != "__main__" and isinstance(own, str):
                lines.append(f"from {home} import {own} as {used}")
                continue
            raise ConfigError(
                f"{name!r} uses {used!r} of its script or notebook, which the run would not have when it is "
                f"resumed: define {used!r} inside of {name}, or put both into a file"
            )
    return "\n".join(lines)


def _names(function: FunctionType) -> set[str]:
    """Names that a function's code, and the code inside of it, looks up."""
    found, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        found |= set(code.co_names)
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return found


def path_of_prompts(prompts: Sequence[str | Prompt | Mapping[str, str]], folder: Path) -> str:
    """A prompt file with these prompts: texts, `Prompt`s, or mappings as in JSON lines."""
    records: list[dict[str, Any]] = []
    for prompt in prompts:
        if isinstance(prompt, Prompt):
            named = {"prompt": prompt.text, "id": prompt.id, "category": prompt.category}
            records.append({key: value for key, value in named.items() if value} | dict(prompt.attributes))
        else:
            records.append({"prompt": prompt} if isinstance(prompt, str) else dict(prompt))
    text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    return _written(folder, "prompts", ".jsonl", text)


def _written(folder: Path, name: str, ending: str, text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = folder.resolve() / f"{name}-{digest}{ending}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return str(path)


def as_settings(values: Mapping[str, object], folder: Path) -> list[tuple[str, object]]:
    """Settings of a session as (dotted path, plain value), in order.

    `{"training": {"steps": 3}}`, `{"training.steps": 3}` and `{"training__steps": 3}` are the same. Functions
    become the `file.py:name` of a `python` reward or loss, lists of prompts become files (`path_of_prompts`).
    """
    found: list[tuple[str, object]] = []
    for key, value in values.items():
        path = key.replace("__", ".")
        if path in ("prompts", "evaluation.prompts", "prompts.source", "explore.validation.prompts"):
            path = "prompts.source" if path == "prompts" and not isinstance(value, Mapping) else path
            if isinstance(value, Sequence) and not isinstance(value, str):
                value = path_of_prompts(value, folder)
        if path in ("rewards", "evaluation.judges", "explore.validation.judges"):
            value = [_scorer(one, folder) for one in (value if isinstance(value, Sequence) else [value])]
        if path in ("algorithm", "loss") and callable(value):
            path, value = "algorithm", {"type": "python", "path": path_of_function(value, folder)}
        if isinstance(value, Mapping) and path != "algorithm":
            inner = as_settings({f"{path}.{name}": each for name, each in value.items()}, folder)
            found += inner
        else:
            found.append((path, _plain(value, folder)))
    return found


def _scorer(reward: object, folder: Path) -> object:
    """A reward of a list: a function under its own name, or settings whose `path` may be a function."""
    if callable(reward):
        return {"name": getattr(reward, "__name__", "reward"), "type": "python"} | {
            "path": path_of_function(reward, folder)
        }
    return _plain(reward, folder)


def _plain(value: object, folder: Path) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, folder) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, folder) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return path_of_function(value, folder) if callable(value) else value
