"""Names of iterates."""

from pathlib import Path

import pytest

from diffexpo.config.iterates import exported_folder, split_iterate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/expo@2", ("runs/expo", 2)),
        ("runs/expo", ("runs/expo", None)),
        ("a@b/run@10", ("a@b/run", 10)),
        ("owner@home", ("owner@home", None)),
        ("@3", ("@3", None)),
    ],
)
def test_a_number_behind_an_at_chooses_an_iterate(text, expected):
    assert split_iterate(text) == expected


def test_a_folder_of_that_very_name_wins(tmp_path):
    (tmp_path / "run@2").mkdir()
    assert split_iterate(str(tmp_path / "run@2")) == (str(tmp_path / "run@2"), None)


def test_every_iterate_has_an_export_of_its_own():
    assert exported_folder(Path("r"), None) == Path("r/export")
    assert exported_folder(Path("r"), 2) == Path("r/export/iteration-2")
