"""A user's own function, named `file.py:function`: where it is, what identifies it, and the function itself.

A file is run as a script would be: modules beside it can be imported. Imports without torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffexpo.errors import ConfigError, MissingError


def split_function(path: str, what: str) -> tuple[Path, str]:
    """The file and the name of a function; `what` begins messages.

    Raises:
        ConfigError: not of the form `file.py:function`. MissingError: there is no such file.
    """
    file_name, separator, name = path.rpartition(":")
    if not separator or not file_name.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"{what}: path={path!r}; expected `file.py:function`")
    file = Path(file_name).expanduser()
    if not file.is_file():
        raise MissingError(f"{what}: no file {file}; expected a Python file with a function {name}")
    return file, name


def files_of(file: Path) -> list[Path]:
    """The file and those beside it that it imports, directly or through each other, itself first."""
    found = [file.resolve()]
    for known in found:  # grows while it is walked
        found += [other for other in _imported_beside(known, file.resolve().parent) if other not in found]
    return found


def _imported_beside(file: Path, folder: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names if node.level)]
        for name in names:
            parts = name.split(".")
            for candidate in (
                folder.joinpath(*parts).with_suffix(".py"),
                folder.joinpath(*parts, "__init__.py"),
            ):
                if parts[0] and candidate.is_file():
                    yield candidate.resolve()


def digest_of(file: Path) -> str:
    """SHA-256 of a file, and of the files beside it that it imports, if there are any."""
    digest, files = hashlib.sha256(), files_of(file)
    for one in files:
        digest.update(one.read_bytes() if len(files) == 1 else hashlib.sha256(one.read_bytes()).digest())
    return digest.hexdigest()


def load_function(file: Path, name: str, what: str) -> Callable[..., object]:
    """The function of a file, which is run; what the file itself raises comes through.

    Raises:
        MissingError: the file has no function of that name.
    """
    module_name = f"diffexpo_own_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None  # a .py path always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses inside the file look themselves up there
    with _beside(file.resolve().parent):
        spec.loader.exec_module(module)
    function = vars(module).get(name)
    if not callable(function):
        names = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise MissingError(
            f"{what}: {file} has no function {name!r}; it defines {', '.join(names) or 'none'}"
        )
    found: Callable[..., object] = function
    return found


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Inside the block modules of the folder can be imported; afterwards another file's of the same name."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin is not None and Path(origin).is_relative_to(folder):
                del sys.modules[name]
