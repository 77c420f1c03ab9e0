"""`python -m worlds.scenes` as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ROOT, start


@pytest.mark.parametrize("what", ["decoder", "diffusion", "flow"])
def test_a_missing_autoencoder_is_named_and_ends_with_3(what: str, tmp_path: Path) -> None:
    done = start("train", what, "3", "--out", tmp_path, module="worlds.scenes", cwd=ROOT).wait()
    assert done.code == 3, done.err
    assert "no autoencoder in" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [("diffusion", 2, "only the flow base is distilled"), ("flow", 3, "expected the folder of a base")],
)
def test_a_teacher_that_does_not_fit_is_refused(what: str, code: int, said: str, tmp_path: Path) -> None:
    done = start("train", what, "3", "--teacher", tmp_path, module="worlds.scenes", cwd=ROOT).wait()
    assert done.code == code, done.err
    assert said in done.err and "Traceback" not in done.err
