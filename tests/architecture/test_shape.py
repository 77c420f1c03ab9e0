"""How large files and functions may be, no circles between files, and no method's settings outside their place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.tree import FILES, MAKERS, SOURCE, imported, module_of, name_of, nodes_of

MAX_LINES_OF_A_FILE = 450
MAX_LINES_OF_A_FUNCTION = 80
MAX_PARAMETERS = 8


def none(found: list[str], rule: str) -> None:
    assert not found, f"{rule}: {len(found)} places:\n" + "\n".join(found)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes_of(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def has_reason(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef, words: str) -> bool:
    """Whether the comment directly above a function (above its decorators) begins with these words."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)]) - 1
    above = []
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
        above.append(lines[first].lstrip("# "))
    return any(line.startswith(words) for line in above)


def test_files_are_short() -> None:
    found = [
        f"{name_of(path)}: {lines} lines"
        for path in [*FILES, *MAKERS]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES_OF_A_FILE
    ]
    none(found, f"no file above {MAX_LINES_OF_A_FILE} lines")


def test_functions_are_short() -> None:
    found = [
        f"{name_of(path)}:{function.lineno} {function.name}: {lines} lines"
        for path in [*FILES, *MAKERS]
        for function in functions(path)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_LINES_OF_A_FUNCTION
        and not has_reason(path, function, "Long because ")
    ]
    none(found, f"no function above {MAX_LINES_OF_A_FUNCTION} lines without a reason")


def test_functions_take_few_parameters() -> None:
    found = []
    for path in [*FILES, *MAKERS]:
        for function in functions(path):
            given = function.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS and not has_reason(path, function, "Many parameters because "):
                found.append(f"{name_of(path)}:{function.lineno} {function.name}: {count} parameters")
    none(found, f"no function above {MAX_PARAMETERS} parameters without a reason")


def graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, inside functions too."""
    modules = {module_of(path): path for path in FILES}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = set()
        for target, _ in imported(path):
            parts = target.split(".")
            known = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
            targets |= {next((name for name in known if name in modules), module)}
        edges[module] = targets - {module, "diffexpo"}
    return edges


def reached(edges: dict[str, set[str]], start: str) -> set[str]:
    """Modules that lead on from one."""
    seen: set[str] = set()
    rest = list(edges[start])
    while rest:
        module = rest.pop()
        if module not in seen:
            seen.add(module)
            rest += edges[module]
    return seen


def test_no_circle_between_files() -> None:
    edges = graph()
    behind = {module: reached(edges, module) for module in edges}
    circles = {
        tuple(sorted({module} | {other for other in behind[module] if module in behind[other]}))
        for module in edges
        if module in behind[module]
    }
    none([", ".join(circle) for circle in sorted(circles)], "no circle between files")


def methods_places() -> list[Path]:
    """Files that define the settings of methods."""
    return sorted((SOURCE / "config" / "methods").glob("*.py"))


def settings_classes() -> set[str]:
    """Classes with a field `type: Literal[...]`: the settings of one method each."""
    return {
        node.name
        for path in methods_places()
        for node in nodes_of(path)
        if isinstance(node, ast.ClassDef)
        and any(
            isinstance(field, ast.AnnAssign)
            and ast.unparse(field.target) == "type"
            and "Literal" in ast.unparse(field.annotation)
            for field in node.body
        )
    }


def test_a_methods_settings_are_named_in_their_own_place_only() -> None:
    classes = settings_classes()
    assert len(classes) >= 15, classes
    own = [*methods_places(), *sorted((SOURCE / "algorithms").glob("*.py"))]
    found = []
    for path in FILES:
        if path in own:
            continue
        for node in nodes_of(path):
            named = {
                name
                for name in (
                    getattr(node, "id", None) if isinstance(node, ast.Name) else None,
                    getattr(node, "attr", None) if isinstance(node, ast.Attribute) else None,
                    node.name if isinstance(node, ast.alias) else None,
                )
                if name in classes
            }
            found += [f"{name_of(path)}:{getattr(node, 'lineno', 0)} {name}" for name in named]
    none(found, "no method's settings class outside config/methods and algorithms")


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()
