"""docs/papers.md names files, functions, pages and recipes that exist, every method, and every paper that a run can cite."""

import ast
import re
from pathlib import Path

import pytest

from diffexpo.config import list_recipes
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.config.papers import WORKS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "diffexpo"
PAGE = ROOT / "docs" / "papers.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| Paper")]


def names_in(path: Path) -> set[str]:
    """Functions and classes that a file defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_a_row_names_what_exists(row):
    paper, here, page, difference = (cell.strip() for cell in row.strip("|").split(" | "))
    assert paper and here and page and difference
    recipes = {recipe.name for recipe in list_recipes()}
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (PAGE.parent / link).is_file(), link
    for recipe in re.findall(r"`([^`]+)`", page):
        assert recipe in recipes, recipe
    # A name belongs to the file before it.
    file = None
    for word in re.findall(r"`([^`]+)`", here):
        if word.endswith(".py"):
            file = SOURCE / word
            assert file.is_file(), word
        elif file is not None:
            assert word in names_in(file), f"{word} in {file.name}"


def test_every_method_file_is_in_a_row():
    files = {f"algorithms/{name}.py" for name in METHOD_BY_NAME}
    assert not {file for file in files if not (SOURCE / file).is_file()}
    assert not {file for file in files if f"`{file}`" not in TEXT}


def test_the_page_and_the_bibliography_have_the_same_papers():
    on_page = set(re.findall(r"\((\d{4}\.\d{5})\)", TEXT))
    assert on_page == {work.arxiv for work in WORKS.values() if work.arxiv}


def test_works_without_an_identifier_stand_on_the_page_by_title():
    bare = {work.title for work in WORKS.values() if not work.arxiv and work.key != "diffexpo"}
    assert not {title for title in bare if title not in TEXT}
