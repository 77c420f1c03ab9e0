"""YAML of strangers: what is no setting in plain YAML, or beyond a bound, is one sentence with its place."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from diffexpo.bounded.yaml_texts import MAX_BYTES, parse_yaml, read_yaml
from diffexpo.config.load import load_config
from diffexpo.errors import ConfigError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
REFUSED = {
    "an alias bomb": (BOMB, "more than 20,000 values"),
    "many values": ("\n".join(f"k{i}: 1" for i in range(20_000)), "more than 20,000 values"),
    "a list in itself": ("a: &a [*a]", "within what it repeats"),
    "a group in itself": ("a: &a {b: *a}", "within what it repeats"),
    "deep lists": ("[" * 5000, "nested deeper than 32 levels"),
    "deep groups": ("{a: " * 900 + "1" + "}" * 900, "nested deeper than 32 levels"),
    "depth by aliases": (
        "a: &a [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 if i else ''}]\n" for i in range(40)),
        "nested deeper than 32 levels",
    ),
    "no hexadecimal number": ("seed: 0x_", "'0x_' is no int"),
    "no binary number": ("seed: 0b_", "'0b_' is no int"),
    "5,000 digits": ("seed: " + "9" * 5000, "is no int"),
    "a word tagged as a number": ("seed: !!int abc", "'abc' is no int"),
    "a word tagged as a truth value": ("seed: !!bool abc", "'abc' is no bool"),
    "a value that JSON has not": ("seed: !!set {a, b}", "tag:yaml.org,2002:set"),
    "a call": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a large text": (f"name: {'x' * MAX_BYTES}", "larger than 256 KiB"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_beyond_a_bound_is_one_short_sentence(what: str) -> None:
    text, reason = REFUSED[what]
    start = time.process_time()
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_yaml(text, "mine.yaml")
    assert time.process_time() - start < 5
    assert str(caught.value).startswith("mine.yaml")
    assert len(str(caught.value)) < 600


def test_aliases_within_the_bounds_repeat_what_they_name() -> None:
    assert parse_yaml("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 3}", "") == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
        "d": {"b": [1, 2], "e": 3},
    }


@pytest.mark.parametrize("word", ["2024-02-30", "2024-02-03", "2001-12-14 21:59:43"])
def test_dates_are_words(word: str) -> None:
    assert parse_yaml(f"name: {word}", "") == {"name": word}


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read: it is not UTF-8 text \(byte 6\)"):
        read_yaml(tmp_path / "latin.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml cannot be read: it is not a regular file"):
        read_yaml(tmp_path / "pipe.yaml")


def test_of_many_problems_the_first_are_told(tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text("\n".join(f"k{number}: 1" for number in range(9000)))
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "many.yaml"], (), {})
    assert time.process_time() - start < 5
    *told, last = str(caught.value).splitlines()
    assert len(told) == 20 and last == "... and 8980 more problems; correct these first"


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(ConfigError, match="expected an integer") as caught:
        load_config([], [f"seed={'k' * 9000}"], {})
    assert len(str(caught.value)) < 20_000
