"""Who may import whom, and which third party stands where (read from the syntax tree; TYPE_CHECKING blocks count for commands only)."""

import ast
from pathlib import Path

import pytest

from tests.architecture.tree import FILES, SOURCE, imported, nodes_of

GROUND = {"errors", "types", "rng", "files", "phases", "bounded", "config"}
BELOW = GROUND | {"diffusion", "algorithms", "policies", "rewards", "data", "training", "online"}

# Room -> rooms it may import (itself always).
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "types": set(),
    "rng": set(),
    "files": {"errors"},
    "phases": set(),
    "bounded": {"errors"},
    "config": {"bounded", "errors"},
    "diffusion": GROUND,
    "algorithms": GROUND | {"diffusion"},
    "policies": GROUND | {"diffusion"},
    "rewards": GROUND | {"diffusion", "worlds"},
    "data": GROUND | {"diffusion"},
    "training": GROUND | {"diffusion", "data"},
    "online": GROUND | {"diffusion", "data", "training"},
    "evaluation": BELOW,
    "labelling": BELOW,
    "worlds": GROUND,
    "estimate": BELOW | {"worlds"},
    "assembly": BELOW | {"evaluation", "labelling", "worlds", "estimate"},
    "cli": {"bounded", "config", "assembly"},
    "__main__": {"cli"},
    "given": {"errors", "files", "types"},
    "running": BELOW | {"cli", "assembly", "evaluation", "given"},
}
# Third party -> rooms or files that may import it. Those not listed are free.
QUARANTINE = {
    "diffusers": {"policies"},
    "peft": {"policies"},
    "httpx2": {"rewards"},
    "accelerate": {"training"},
    "transformers": {"policies", "rewards"},
    "tokenizers": set(),
    "pyarrow": {"data", "worlds"},
    "matplotlib": {"evaluation"},
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
    "files.py",
    "phases.py",
    "bounded",
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


def room_of(module: str) -> str | None:
    """`diffexpo.data.store` is in `data`; the bare package and its version are nobody's; its lazy names are a way around."""
    names = module.split(".")
    if len(names) < 2 or names[1] == "__version__":
        return None
    return names[1] if names[1] in MAY_IMPORT else "__init__"


def test_rooms_import_only_what_lies_below():
    wrong = []
    for path in FILES:
        room, name = parts(path)
        allowed = MAY_IMPORT[room] | {room, None}
        wrong += [
            f"{name}:{line} imports {module}; {room} may import {sorted(allowed - {None})} only"
            for module, line in imported(path, typing=room == "cli")
            if module.split(".")[0] == "diffexpo" and room_of(module) not in allowed
        ]
    assert not wrong, "\n".join(wrong)


def test_third_parties_stay_in_quarantine():
    wrong = []
    for path in FILES:
        room, name = parts(path)
        for module, line in imported(path):
            top = module.split(".")[0]
            if top in BANNED:
                wrong.append(f"{name}:{line} imports {module}, which stands nowhere")
            elif top in QUARANTINE and room not in QUARANTINE[top] and name not in QUARANTINE[top]:
                wrong.append(f"{name}:{line} imports {module}, allowed only in {sorted(QUARANTINE[top])}")
    assert not wrong, "\n".join(wrong)


def test_light_files_do_not_import_torch():
    light = [path for path in FILES if NO_TORCH & {*parts(path)}]
    assert light
    wrong = [
        f"{parts(path)[1]}:{line} imports {module}"
        for path in light
        for module, line in imported(path, top_level=True)
        if module.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ["diffusion", "algorithms"])
def test_mathematics_imports_only_torch(room):
    allowed = {"torch", "diffexpo", "numpy"} if room == "algorithms" else {"torch", "diffexpo"}
    import sys

    for path in sorted((SOURCE / room).rglob("*.py")):
        foreign = {m.split(".")[0] for m, _ in imported(path)} - allowed - set(sys.stdlib_module_names)
        assert not foreign, f"{parts(path)[1]} imports {sorted(foreign)}"


def test_what_strangers_wrote_is_parsed_in_one_room():
    parsers = ("json.load", "json.loads", "yaml.load", "yaml.safe_load", "Image.open")
    calls = [
        f"{parts(path)[1]}:{node.lineno} {ast.unparse(node)}"
        for path in FILES
        # pictures of the embedded worlds come with the package
        if parts(path)[0] not in ("bounded", "worlds")
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in parsers
    ]
    assert not calls, f"read these through diffexpo.bounded: {calls}"


def test_no_torch_save_load_or_pickle():
    calls = [
        f"{parts(path)[1]}:{node.lineno} {ast.unparse(node)}"
        for path in FILES
        for node in nodes_of(path)
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
