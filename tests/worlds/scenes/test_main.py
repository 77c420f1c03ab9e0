"""`python -m worlds.scenes` as a person types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, environment


@pytest.mark.parametrize("what", ["decoder", "diffusion", "flow"])
def test_a_missing_autoencoder_is_named_and_ends_with_3(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worlds.scenes", "train", what, "3", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "no autoencoder in" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("diffusion", 2, "only the flow base is distilled"), ("flow", 3, "expected the folder of a base")],
)
def test_a_teacher_that_does_not_fit_is_refused(what: str, code: int, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worlds.scenes", "train", what, "3", "--teacher", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
