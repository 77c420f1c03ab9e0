"""Files and folders are whole or absent, and what was there before survives every failure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from diffexpo.errors import StoreError
from diffexpo.files import put, replacing, write_bytes, write_json, write_text


def test_files_appear_whole_in_folders_that_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "caf\u00e9.txt", "caf\u00e9\n")
    assert (tmp_path / "a" / "b" / "caf\u00e9.txt").read_bytes() == b"caf\xc3\xa9\n"
    write_json(tmp_path / "x.json", {"b": [1.5, None], "a": "\u00e9"})
    assert (tmp_path / "x.json").read_text() == '{\n "b": [\n  1.5,\n  null\n ],\n "a": "\\u00e9"\n}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.json"]


def test_a_folder_appears_whole_over_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "half").write_bytes(b"x")
    with replacing(tmp_path / "out") as temporary:
        (temporary / "deep").mkdir(parents=True)
        put(temporary / "deep" / "file", b"whole")
        assert not (tmp_path / "out").exists()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "out",
        "out/deep",
        "out/deep/file",
    ]


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free space and resume"), (errno.EACCES, "permissions")]
)
def test_a_disk_that_refuses_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, advice: str
) -> None:
    write_bytes(tmp_path / "file", b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match=rf"could not write .*file: {os.strerror(code)}.*{advice}"):
        write_bytes(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_an_exception_of_the_writer_passes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "file") as temporary:
        put(temporary, b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
