"""Pages of the documentation: their length, what the gallery and the Python reference hold, the site's navigation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import diffexpo
from diffexpo.config.methods import METHOD_BY_NAME
from tests.architecture.tree import ROOT
from tests.snippets import PAGES, snippets

DOCS = ROOT / "docs"
MAX_WORDS = 2000
MEASURED = ("results.md", "methods.md", "without_reward.md", "emoji.md", "scenes.md")
GUIDES = ("index.md", "quickstart.md", "gallery.md", "tutorials", "howto", "concepts", "lab", *MEASURED)


def words(page: Path) -> int:
    """Words of a page outside of code."""
    text = page.read_text(encoding="utf-8")
    for snippet in snippets(page):
        text = text.replace(snippet.text, "")
    return len(re.findall(r"[^\W_][\w'.,%/-]*", text))


GUIDE_PAGES = [
    page for page in PAGES if page.is_relative_to(DOCS) and page.relative_to(DOCS).parts[0] in GUIDES
]


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDE_PAGES], ids=lambda page: page.name)
def test_a_guide_can_be_read_at_a_sitting(page: Path) -> None:
    assert 50 < words(page) <= MAX_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("name", METHOD_BY_NAME)
def test_the_gallery_has_every_method(name: str) -> None:
    assert f"(algorithms/{name}.md)" in (DOCS / "gallery.md").read_text(encoding="utf-8")


def test_the_gallery_shows_a_curve_of_each_method_that_has_one() -> None:
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"\(images/methods/(\w+)\.png\)\]\(algorithms/(\w+)\.md\)", gallery))
    pages = {
        name: (DOCS / "algorithms" / f"{name}.md").read_text(encoding="utf-8") for name in METHOD_BY_NAME
    }
    assert set(shown.values()) == {name for name, text in pages.items() if "](../images/methods/" in text}
    assert not {image for image, name in shown.items() if f"images/methods/{image}.png" not in pages[name]}


def test_every_public_name_stands_in_an_example_that_is_run() -> None:
    code = "\n".join(
        each.text for page in PAGES for each in snippets(page) if each.is_run and each.language == "python"
    )
    assert not {name for name in diffexpo.__all__ if not re.search(rf"\bdiffexpo\.{name}\b", code)}


@pytest.mark.parametrize("page", sorted((DOCS / "api").glob("*.md")), ids=lambda page: page.name)
def test_a_page_of_the_python_reference_is_about_a_public_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"heading: diffexpo\.(\w+)", text)
    if named:
        (name,) = named
        assert name in diffexpo.__all__ and text.startswith(f"# `{name}`\n")
        assert any(f"diffexpo.{name}" in each.text for each in snippets(page) if each.is_run)
    assert len(named) == 1 or page.stem in ("index", "diffusion", "algorithms")


def hooks() -> ModuleType:
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "theme" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for each in inner for page in pages_of(each)]  # type: ignore[union-attr]


def test_every_page_stands_once_in_the_navigation_and_a_new_one_too(tmp_path: Path) -> None:
    listed = pages_of(hooks().navigation(DOCS))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    for name in ("index.md", "brand_new.md", "howto/other.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# New\n")
    sections = {
        name: pages_of(pages) for each in hooks().navigation(tmp_path) for name, pages in each.items()
    }
    assert "brand_new.md" in sections["Reference"] and "howto/other.md" in sections["How to"]
