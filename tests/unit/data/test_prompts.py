"""Prompt files: what is good is read exactly, what is bad is named with its line, what is dropped is
counted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffexpo.data.prompts import filter_long, load_prompts, prompt_id, read_prompts
from diffexpo.errors import ImportFormatError, MissingError
from diffexpo.types import Prompt


def write(tmp_path: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_become_prompts_in_order(tmp_path: Path) -> None:
    prompts = load_prompts(
        write(tmp_path, b"\xef\xbb\xbf a red heart \r\ncaf\xc3\xa9\xe2\x80\xa8terrace\na cat")
    )
    assert [prompt.text for prompt in prompts] == ["a red heart", "caf\u00e9\u2028terrace", "a cat"]


def test_an_id_depends_on_the_text_only(tmp_path: Path) -> None:
    first = load_prompts(write(tmp_path, "a cat\na dog\n"))
    second = load_prompts(write(tmp_path, "a dog\na bird\na cat\n"))
    assert {p.text: p.id for p in first}.items() <= {p.text: p.id for p in second}.items()
    assert prompt_id("a cat") == "p-8178a3117428"


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    prompts, report = read_prompts(write(tmp_path, "a\nb\na\n a \n"))
    assert [prompt.text for prompt in prompts] == ["a", "b"]
    assert (report.read, report.kept, report.duplicates) == (4, 2, 2)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_comments_and_blank_lines_are_skipped_and_counted_and_move_no_line_number(
    tmp_path: Path, mark: str, end: str
) -> None:
    lines = ["# a list", "a cat", "", "  # indented", "   ", "a dog # with a mark inside", "#last", ""]
    prompts, report = read_prompts(write(tmp_path, mark + end.join(lines) + end))
    assert [prompt.text for prompt in prompts] == ["a cat", "a dog # with a mark inside"]
    assert (report.read, report.kept, report.skipped) == (2, 2, 6)
    records = mark + end.join(["# a list", '{"prompt": "#1 fan"}', "", '{"prompt": ""}'])
    with pytest.raises(ImportFormatError, match="line 4: 'prompt' is ''"):
        load_prompts(write(tmp_path, records, "p.jsonl"))
    good = write(tmp_path, records.replace('""', '"a cat"'), "q.jsonl")
    assert [prompt.text for prompt in load_prompts(good)] == ["#1 fan", "a cat"]


def test_json_lines_and_parquet_say_the_same(tmp_path: Path) -> None:
    records = [
        {"prompt": "a cat", "id": "cat", "category": "animals", "negative_prompt": "blurry"},
        {"prompt": "a firefighter", "id": "fire", "category": "people", "negative_prompt": None},
    ]
    lines = write(tmp_path, "\n".join(map(json.dumps, records)), "p.jsonl")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    expected = [
        Prompt("cat", "a cat", "animals", {"negative_prompt": "blurry"}),
        Prompt("fire", "a firefighter", "people", {}),
    ]
    assert load_prompts(lines) == load_prompts(tmp_path / "p.parquet") == expected


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "p.txt", "holds no prompt"),
        ("# only a comment\n\n", "p.txt", "holds no prompt"),
        (b"a\ncaf\xe9\n", "p.txt", r"line 2 is not UTF-8 \(byte 0xe9 at column 4\)"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "p.txt", "not a text file"),
        ("a\n", "p.csv", r"ends in '.csv'; expected .txt, .jsonl, .parquet"),
        ('{"prompt": "a"}\n{"promt": "b"}\n', "p.jsonl", r"line 2: there is no 'prompt', only 'promt'"),
        ('{"prompt": "a"}\n{"prompt"\n', "p.jsonl", r"line 2 is not JSON"),
        ('["a"]\n', "p.jsonl", r"line 1 is '\[\"a\"\]'; expected an object"),
        ('{"prompt": ""}\n', "p.jsonl", r"'prompt' is ''"),
        ('{"prompt": 3}\n', "p.jsonl", r"'prompt' is 3"),
        ('{"prompt": "a", "id": 3.5}\n', "p.jsonl", r"'id' is 3.5"),
        (
            '{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n',
            "p.jsonl",
            r"line 2: id 'x' belongs to another",
        ),
        ("PAR1 and then nothing", "p.parquet", "not readable Parquet"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, content: str | bytes, name: str, message: str) -> None:
    with pytest.raises(ImportFormatError, match=message) as caught:
        load_prompts(write(tmp_path, content, name))
    assert name in str(caught.value)


def test_a_missing_file_is_missing_and_the_near_one_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a", "prompts.txt")
    with pytest.raises(MissingError, match=r"there is no file .*promts.txt.*Did you mean .*prompts.txt"):
        load_prompts(tmp_path / "promts.txt")
    with pytest.raises(MissingError, match="there is no file"):
        load_prompts(tmp_path)


def test_a_relative_path_is_told_with_the_folder_it_was_looked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match=f"there is no file data/p.txt in {tmp_path}"):
        load_prompts("data/p.txt")


def test_long_prompts_are_dropped_not_cut() -> None:
    prompts = [Prompt(str(n), "word " * n) for n in range(1, 1000)]
    kept, dropped = filter_long(prompts, lambda texts: [len(text.split()) for text in texts], 77)
    assert kept == prompts[:77] and dropped == prompts[77:]
