"""Functions and lists of a session become files that are named by their content."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from diffexpo.errors import ConfigError
from diffexpo.given import as_settings, path_of_function, path_of_prompts
from diffexpo.types import Prompt
from tests.commands import ROOT


def score(images, prompts):
    return [math.pi] * len(prompts)


LIMIT = 3


def bounded(images, prompts):
    return [LIMIT] * len(prompts)


def in_main(function):
    """The function as a script or notebook would have it."""
    copy = type(function)(
        function.__code__, function.__globals__ | {"__name__": "__main__"}, function.__name__
    )
    copy.__module__ = "__main__"
    return copy


def test_a_function_of_a_module_is_named_by_its_file(tmp_path: Path) -> None:
    assert path_of_function(score, tmp_path) == f"{Path(__file__).resolve()}:score"
    assert not any(tmp_path.iterdir())


def test_a_function_of_a_script_is_copied_with_the_modules_that_it_uses(tmp_path: Path) -> None:
    path = path_of_function(in_main(score), tmp_path)
    file, _, name = path.rpartition(":")
    assert name == "score" and path == path_of_function(in_main(score), tmp_path)
    namespace: dict[str, object] = {}
    exec(Path(file).read_text(), namespace)  # noqa: S102 (our own copy)
    assert namespace["score"](None, ["a", "b"]) == [math.pi, math.pi]


def test_what_a_resumed_run_could_not_find_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'bounded' uses 'LIMIT' of its script"):
        path_of_function(in_main(bounded), tmp_path)
    for function in (lambda images, prompts: [], str.upper, Path(__file__).exists):
        with pytest.raises(ConfigError, match="no function of its own name"):
            path_of_function(function, tmp_path)
    assert not any(tmp_path.iterdir())


def test_prompts_are_the_same_file_if_and_only_if_they_are_the_same(tmp_path: Path) -> None:
    rows = ["a cat", Prompt("dog", "a dog", "animals", {"negative_prompt": "blurry"}), {"prompt": "a bird"}]
    path = path_of_prompts(rows, tmp_path)
    assert path == path_of_prompts(list(rows), tmp_path) != path_of_prompts(rows[:2], tmp_path)
    read = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert read[1] == {"prompt": "a dog", "id": "dog", "category": "animals", "negative_prompt": "blurry"}


def test_ways_of_writing_a_setting_are_the_same(tmp_path: Path) -> None:
    expected = [("training.steps", 3)]
    for values in ({"training": {"steps": 3}}, {"training.steps": 3}, {"training__steps": 3}):
        assert as_settings(values, tmp_path) == expected
    found = dict(as_settings({"rewards": score, "algorithm": {"type": "expo", "beta": 5}}, tmp_path))
    assert found["rewards"] == [
        {"name": "score", "type": "python", "path": f"{ROOT}/tests/unit/test_given.py:score"}
    ]
    assert found["algorithm"] == {"type": "expo", "beta": 5}
