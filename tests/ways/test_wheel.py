"""The wheel as a stranger gets it: no link that leads nowhere, examples and types inside."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from tests.commands import ROOT

pytest.importorskip("setuptools")
RELATIVE = re.compile(r"\]\((?!https?:|#|mailto:)")
SOURCE = "https://example.org/owner/name"


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_are_absolute_where_the_address_is_known(setup: ModuleType) -> None:
    text = setup.description((ROOT / "README.md").read_text(encoding="utf-8"), SOURCE + "/")
    assert not RELATIVE.search(text)
    targets = re.findall(rf"\]\({SOURCE}/(\w+)/main/([^)#]+)", text)
    assert len(targets) > 20 and {kind for kind, _ in targets} == {"blob", "raw"}
    assert all((ROOT / path).exists() for _, path in targets)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[own data](docs/howto/own_data.md), see", "own data (`docs/howto/own_data.md`), see"),
        ("[docs/lab](docs/lab/index.md)", "docs/lab"),
        ("![a picture](docs/images/a.png)", ""),
        (
            "[paper](https://arxiv.org/abs/1) [above](#claims)",
            "[paper](https://arxiv.org/abs/1) [above](#claims)",
        ),
    ],
)
def test_without_an_address_no_link_leads_nowhere(setup: ModuleType, text: str, told: str) -> None:
    assert setup.description(text, None) == told


def test_a_built_wheel_has_description_examples_and_types(tmp_path: Path) -> None:
    """Without the assets, which take long to pack."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "diffexpo").mkdir(parents=True)
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "src" / "diffexpo" / name, tmp_path / "src" / "diffexpo" / name)
    project = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    assert "[project.urls]" not in project or "Source" in project
    (tmp_path / "pyproject.toml").write_text(f'{project}\n[project.urls]\nSource = "{SOURCE}"\n')
    build = "import sys, setuptools.build_meta as build; print(build.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        (metadata,) = [wheel.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert "Description-Content-Type: text/markdown" in metadata and f"({SOURCE}/blob/main/docs/" in metadata
    assert not RELATIVE.search(metadata)
    packed = {Path(name).name for name in names if "/share/diffexpo/examples/" in name}
    assert packed == {path.name for path in (ROOT / "examples").iterdir() if path.is_file()}
    assert "diffexpo/py.typed" in names
