"""What users meet: a quick `--help`, documented settings, public names that exist."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from diffexpo.config import RunConfig
from diffexpo.config.explain import settings
from diffexpo.config.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_answers_within_a_second():
    # Processor time of the command and its children: on an idle machine that is the waiting time, and beside other tests the
    # clock would measure them.
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "diffexpo", "--help"], capture_output=True, timeout=60, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import diffexpo", ("torch", "pydantic", "numpy", "typer")),
        ("import diffexpo.cli.main", ("torch", "pydantic", "numpy", "diffusers", "transformers", "pyarrow")),
        (
            "import diffexpo.config, diffexpo.types, diffexpo.errors, diffexpo.rng",
            ("torch", "diffusers", "transformers"),
        ),
        ("from diffexpo.data.store import Store", ("torch", "diffusers", "transformers")),
        (
            "import diffexpo.diffusion, diffexpo.algorithms",
            ("diffusers", "transformers", "peft", "accelerate", "pyarrow"),
        ),
    ],
)
def test_imports_stay_light(statement, heavy):
    done = python(f"import sys; {statement}; print(*[name for name in {heavy!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_help_imports_no_torch():
    code = "import sys\ntry:\n    from diffexpo.cli.main import main\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    done = python(code + "print('LOADED', *[n for n in ('torch', 'pydantic', 'numpy') if n in sys.modules])")
    assert done.stdout.splitlines()[-1].split() == ["LOADED"]


def test_every_public_name_exists():
    import diffexpo

    for name in diffexpo.__all__:
        assert vars(diffexpo).get(name) is not None or diffexpo.__getattr__(name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        diffexpo.nonsense  # noqa: B018


def models(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    seen.add(model)
    for field in model.model_fields.values():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ()), *METHODS):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                models(inner, seen)
    return seen


def test_every_setting_is_documented():
    bare = []
    for model in models(RunConfig, set()):
        for name, field in model.model_fields.items():
            is_group = "Config" in str(field.annotation)
            if not is_group and len((field.description or "").split()) == 0:
                bare.append(f"{model.__name__}.{name}")
    assert not bare, f"settings without a docstring below them: {bare}"


def test_settings_are_listed_once_with_what_they_expect():
    listed = [(setting.path, method) for setting in settings() for method in setting.methods or ("",)]
    assert len(listed) == len(set(listed)) > 80
    assert all(setting.expected for setting in settings())


def test_constraints_pin_every_dependency_within_its_bounds():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {
        canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["label"], *extras["docs"]]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text
        assert all(clause.operator == ">=" for clause in requirement.specifier), (
            "pyproject states lower bounds only"
        )
    assert all(pin.local is None for pin in pins.values())
    assert "torchvision" not in pins


def test_what_build_offers_stays_callable_whatever_is_imported_first():
    """A module of the same name would take a function's place once it is imported."""
    from diffexpo import assembly

    modules = {path.stem for path in Path(assembly.__file__).parent.glob("*.py")}
    assert not modules & set(assembly.__all__)
    for name in assembly.__all__:
        assert callable(getattr(assembly, name)) and callable(getattr(assembly, name)), name
