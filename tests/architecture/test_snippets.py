"""Every command, recipe and line of Python on a page of the documentation is one that there is (see tests/snippets.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.snippets import PAGES, check, check_diffexpo, inline_commands, snippets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_is_what_there_is(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = snippets(page)
    files = {}
    for snippet in found:
        if snippet.title is not None:
            files[snippet.title] = tmp_path / snippet.title
            files[snippet.title].write_text(snippet.text + "\n")
    for snippet in found:
        try:
            check(snippet, files)
        except Exception as error:
            raise AssertionError(f"{snippet}: {error}") from error
    for words in inline_commands(page):
        check_diffexpo(words[1:], files, is_whole=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_in_running_text_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))) <= targets
