"""The page on Python: every public name stands on it, and its code runs in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import diffexpo
from tests.commands import ROOT

TEXT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_every_public_name_stands_on_the_page() -> None:
    table = TEXT.partition("## Every public name")[2]
    assert set(re.findall(r"`(\w+)`", table)) >= set(diffexpo.__all__)


@pytest.mark.timeout(1200)  # two small runs of the embedded model, beside whatever else the machine does
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)  # noqa: S102 (the page's own lines)
    run = names["run"]
    assert isinstance(run, diffexpo.Run) and run.state == "finished"
    assert (run.folder / "export" / "iteration-2" / "README.md").is_file()
