"""What the Tab key offers, asked as a shell asks it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffexpo.cli.main import app


def offered(*words: str) -> set[str]:
    """What bash is offered for the last word of `diffexpo ...`."""
    asked = {
        "_DIFFEXPO_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["diffexpo", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = CliRunner().invoke(app, prog_name="diffexpo", env=asked)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return set(done.stdout.split())


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
        for number in (0, 1, 2):
            (tmp_path / "runs" / name / "checkpoints" / f"weights-000{number}.safetensors").touch()
    (tmp_path / "mine.yaml").write_text("")
    return tmp_path


def test_commands_recipes_files_runs_iterates_and_settings_are_offered(runs: Path) -> None:
    assert {"track", "export", "runs"} <= offered("")
    assert {"scenes/quick", "scenes/expo"} <= offered("run", "scenes/")
    assert offered("run", "mi") == {"mine.yaml"}
    assert offered("export", "d") == {"dogs"}
    assert offered("export", "dogs@") == {"dogs@1", "dogs@2"}
    assert {"training.steps=", "training.batch_size="} <= offered("run", "--set", "training.")
    assert offered("run", "--set", "training.steps=3") == set()


def test_nothing_is_offered_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert offered("export", "x") == set()
    assert offered("export", "nowhere@") == set()
