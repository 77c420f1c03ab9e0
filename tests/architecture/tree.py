"""The source files and their imports, as the architecture tests read them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "diffexpo"
FILES = sorted(SOURCE.rglob("*.py"))
MAKERS = sorted((ROOT / "worlds").rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree."""
    return tuple(ast.walk(tree_of(path)))


def name_of(path: Path) -> str:
    """A file as messages name it, relative to the repository."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported(path: Path, *, top_level: bool = False, typing: bool = False) -> tuple[tuple[str, int], ...]:
    """Dotted names that a file imports, with their lines; TYPE_CHECKING blocks count with `typing` only.

    With `top_level` only the imports that run when the file itself is imported.
    """
    found: list[tuple[str, int]] = []
    package = ["diffexpo", *path.relative_to(SOURCE).parts[:-1]]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            for child in node.orelse:
                visit(child)
            return
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            stem = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (stem, node.module or "") if part)
            if module == "diffexpo":
                found.extend((f"diffexpo.{alias.name}", node.lineno) for alias in node.names)
            else:
                found.append((module, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree_of(path))
    return tuple(found)
