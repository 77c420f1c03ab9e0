"""Every file that CONTRIBUTING.md names as an example or as a place to edit exists; its table of rooms is that of the import test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffexpo.config.families import FAMILIES
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.config.rewards import CARDS
from tests.architecture.test_imports import MAY_IMPORT
from tests.architecture.tree import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ADDING = TEXT.partition("\n## Adding\n")[2].partition("\n## Rules\n")[0]
SECTIONS = {part.partition("\n")[0]: part for part in ADDING.split("\n### ")[1:]}
# Each list is read with the names of something that was added so: what a NAME stands for, in order of preference.
EXAMPLES = {
    "A method": tuple(METHOD_BY_NAME),
    "A reward": tuple(sorted({card.__module__.rpartition(".")[2] for card in CARDS})),
    "A model family": tuple(card.name for card in FAMILIES.values()),
    "An importer of offline data": ("hpd", "tables", "webdataset"),
}
FILE = re.compile(r"`([\w./-]*[\w-]+\.(?:py|md|yaml|bib|json))`")


def files_of(text: str) -> list[str]:
    return FILE.findall(text)


def at(name: str) -> Path:
    return ROOT / name


@pytest.mark.parametrize("section", EXAMPLES)
def test_every_file_of_a_list_exists(section: str) -> None:
    text = SECTIONS[section]
    named = files_of(text)
    assert any("NAME" in file for file in named) and any("NAME" not in file for file in named)
    for file in named:
        if "NAME" not in file:
            assert at(file).is_file(), file


@pytest.mark.parametrize("section", EXAMPLES)
def test_every_file_of_a_new_name_has_counterparts(section: str) -> None:
    for file in {file for file in files_of(SECTIONS[section]) if "NAME" in file}:
        assert any(at(file.replace("NAME", name)).is_file() for name in EXAMPLES[section]), file


@pytest.mark.parametrize("name", METHOD_BY_NAME)
def test_every_method_has_card_code_and_page(name: str) -> None:
    """A method that was added has the files that the page lists."""
    needed = [file for file in files_of(SECTIONS["A method"]) if "NAME" in file and "recipes" not in file]
    assert len(needed) == 3
    assert not [file for file in needed if not at(file.replace("NAME", name)).is_file()]


def test_files_outside_of_the_lists_exist() -> None:
    outside = TEXT.replace(ADDING, "")
    assert not [file for file in files_of(outside) if "/" in file and not at(file).is_file()]


def test_the_table_of_rooms_has_every_room() -> None:
    table = TEXT.partition("| Room |")[2].partition("\n\n")[0]
    rooms = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert rooms == set(MAY_IMPORT) - {"__init__", "__main__"}
