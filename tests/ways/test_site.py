"""The documentation as a site: built strictly, readable without a network, its formulas typeset."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

pytest.importorskip("material")
FETCHED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=\"?(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there_and_fetches_nothing(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 90
    for page in pages:
        text = (site / page).read_text(encoding="utf-8")
        assert not FETCHED.search(text), f"{page}: {FETCHED.search(text)}"
    assert not re.search(
        r"@import|url\(\"?https?:", "".join(path.read_text() for path in site.rglob("*.css"))
    )
    assert (site / "search" / "search_index.js").stat().st_size > 100_000


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs" / "concepts").glob("*.md")))
def test_formulas_are_typeset(site: Path, name: str) -> None:
    source = (ROOT / "docs" / "concepts" / f"{name}.md").read_text(encoding="utf-8")
    text = (site / "concepts" / f"{name}.html").read_text(encoding="utf-8")
    formulas = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert len([each for each in formulas if 'display="block"' in each]) == source.count("$$") // 2 > 0
    assert "arithmatex" not in text and not [each for each in formulas if "\\" in each]


def test_signatures_and_check_values_come_from_docstrings(site: Path) -> None:
    text = (site / "api" / "diffusion_dpo_loss.html").read_text(encoding="utf-8")
    assert "label_smoothing" in text and "ln 2" in text and "Returns:" in text and "arXiv 2311.12908" in text
