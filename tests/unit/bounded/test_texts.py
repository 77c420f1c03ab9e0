"""Files and JSON of strangers: bounded in bytes and depth, and text that can be written again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffexpo.bounded.texts import UnreadableError, check_json_files, parse_json, read_json, read_regular


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[" * 70 + "]" * 70, "nested deeper than 64 levels"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ('{"name": "\\ud83d"}', "half a surrogate pair"),
        ('{"\\udc00": 1}', "half a surrogate pair"),
        ("9" * 5000, "more than 1000 digits"),
        (b'"\xff"', r"not UTF-8 text \(byte 1\)"),
        ("{'a': 1}", "line 1 column 2"),
        ("", "Expecting value"),
    ],
)
def test_what_is_beyond_a_bound_is_refused_with_a_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason):
        parse_json(text)


def test_what_is_within_the_bounds_is_what_json_says() -> None:
    value = {"a": [1, 2.5, None, True, "é😀"], "b": [[{"c": []}]] * 100}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value
    assert parse_json("[" * 64 + "]" * 64)


def test_only_regular_files_within_a_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_json(tmp_path / "a.json") == [1, 2]
    assert read_regular(tmp_path / "a.json", 6) == b"[1, 2]"
    with pytest.raises(UnreadableError, match="larger than 5 bytes"):
        read_regular(tmp_path / "a.json", 5)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises((UnreadableError, IsADirectoryError)):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_files_that_another_library_reads_are_looked_at_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check_json_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 70 + "]" * 70)
    with pytest.raises(UnreadableError, match="tokenizer.json: nested deeper"):
        check_json_files(tmp_path)
