"""Who may import whom, and which third party stands where (read from the syntax tree, TYPE_CHECKING blocks excepted)."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "diffexpo"
FILES = sorted(SOURCE.rglob("*.py"))
GROUND = {"errors", "types", "rng", "phases", "config"}
BELOW = GROUND | {"diffusion", "algorithms", "policies", "rewards", "data", "training", "online"}

# Room -> rooms it may import (itself always).
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "types": set(),
    "rng": set(),
    "phases": set(),
    "config": {"errors"},
    "diffusion": GROUND,
    "algorithms": GROUND | {"diffusion"},
    "policies": GROUND | {"diffusion"},
    "rewards": GROUND | {"diffusion"},
    "data": GROUND | {"diffusion"},
    "training": GROUND | {"diffusion", "data"},
    "online": GROUND | {"diffusion", "data", "training"},
    "evaluation": BELOW,
    "labelling": BELOW,
    "emoji": BELOW,
    "estimate": BELOW | {"emoji"},
    "assembly": BELOW | {"evaluation", "labelling", "emoji", "estimate"},
    "cli": GROUND | {"assembly"},
    "__main__": {"cli"},
}
# Single files that reach further: their commands are about exactly that room.
EXCEPTIONS = {"cli/emoji.py": {"emoji"}, "cli/doctor.py": {"emoji"}, "cli/data.py": {"data"}}

# Third party -> rooms or files that may import it. Those not listed are free.
QUARANTINE = {
    "diffusers": {"policies", "emoji"},
    "peft": {"policies", "emoji"},
    "accelerate": {"training"},
    "transformers": {"policies", "rewards", "emoji"},
    "tokenizers": {"emoji"},
    "pyarrow": {"data", "emoji"},
    "matplotlib": {"evaluation/report.py"},
    "jinja2": {"evaluation", "labelling"},
    "fastapi": {"labelling"},
    "uvicorn": {"labelling"},
    "pydantic": {"config"},
    "typer": {"cli"},
    "rich": {"cli"},
}
BANNED = {
    "torchvision",
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "open_clip",
    "timm",
    "lpips",
    "imp",
}
NO_TORCH = {
    "errors.py",
    "types.py",
    "rng.py",
    "phases.py",
    "config",
    "cli",
    "labelling",
    "data/store.py",
    "data/__init__.py",
}


def parts(path: Path) -> tuple[str, str]:
    """Room and path below the package."""
    relative = path.relative_to(SOURCE)
    return (relative.parts[0] if len(relative.parts) > 1 else relative.stem), relative.as_posix()


def imported(path: Path, *, top_level: bool = False) -> list[tuple[str, int]]:
    """Dotted names a file imports with their lines; with `top_level` only those that run when it is imported."""
    found: list[tuple[str, int]] = []
    package = ["diffexpo", *path.relative_to(SOURCE).parts[:-1]]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
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

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def room_of(module: str) -> str | None:
    """`diffexpo.data.store` is in `data`; the bare package and its version are nobody's; its lazy names are a way around."""
    names = module.split(".")
    if len(names) < 2 or names[1] == "__version__":
        return None
    return names[1] if names[1] in MAY_IMPORT else "__init__"


@pytest.mark.parametrize("path", FILES, ids=[parts(path)[1] for path in FILES])
def test_rooms_import_only_what_lies_below(path):
    room, name = parts(path)
    allowed = MAY_IMPORT[room] | EXCEPTIONS.get(name, set()) | {room, None}
    wrong = [
        f"{name}:{line} imports {module}"
        for module, line in imported(path)
        if module.split(".")[0] == "diffexpo" and room_of(module) not in allowed
    ]
    assert not wrong, f"{room} may import {sorted(allowed - {None})} only:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=[parts(path)[1] for path in FILES])
def test_third_parties_stay_in_quarantine(path):
    room, name = parts(path)
    wrong = []
    for module, line in imported(path):
        top = module.split(".")[0]
        if top in BANNED:
            wrong.append(f"{name}:{line} imports {module}, which stands nowhere")
        elif top in QUARANTINE and room not in QUARANTINE[top] and name not in QUARANTINE[top]:
            wrong.append(f"{name}:{line} imports {module}, allowed only in {sorted(QUARANTINE[top])}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=[parts(path)[1] for path in FILES])
def test_light_files_do_not_import_torch(path):
    room, name = parts(path)
    if not NO_TORCH & {room, name}:
        return
    wrong = [line for module, line in imported(path, top_level=True) if module.split(".")[0] == "torch"]
    assert not wrong, f"{name} imports torch at lines {wrong}"


@pytest.mark.parametrize("room", ["diffusion", "algorithms"])
def test_mathematics_imports_only_torch(room):
    allowed = {"torch", "diffexpo", "numpy"} if room == "algorithms" else {"torch", "diffexpo"}
    import sys

    for path in sorted((SOURCE / room).rglob("*.py")):
        foreign = {m.split(".")[0] for m, _ in imported(path)} - allowed - set(sys.stdlib_module_names)
        assert not foreign, f"{parts(path)[1]} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", FILES, ids=[parts(path)[1] for path in FILES])
def test_no_torch_save_load_or_pickle(path):
    calls = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("torch.save", "torch.load", "torch.hub", "np.load", "numpy.load")
    ]
    assert not calls, calls


def test_no_banned_names_and_no_empty_rooms():
    banned = {"utils", "util", "common", "core", "helpers", "helper", "manager", "registry", "callbacks"}
    root = SOURCE.parents[1]
    found = [
        path.relative_to(root)
        for folder in ("src", "tests", "benchmarks", "examples", "docs")
        for path in (root / folder).rglob("*")
        if path.stem.lower() in banned and "__pycache__" not in path.parts
    ]
    assert not found, f"not a folder or a file: {found}"


def test_every_folder_with_code_is_a_package():
    bare = sorted({parts(path)[1] for path in FILES if not (path.parent / "__init__.py").exists()})
    assert not bare, f"no __init__.py beside {bare}: a wheel would leave them out"


def test_every_room_has_a_rule():
    rooms = {parts(path)[0] for path in FILES}
    assert rooms <= set(MAY_IMPORT)
