"""Prompts of a run against what the text encoder takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from diffexpo.assembly.objects import build_prompts
from diffexpo.config import load_config
from diffexpo.errors import ConfigError


class Lines:
    """A console that remembers."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


WORDS = SimpleNamespace(max_tokens=4, count_tokens=lambda texts: [len(text.split()) for text in texts])


def test_long_prompts_are_counted_and_a_pool_of_them_alone_is_refused(tmp_path: Path) -> None:
    file, console = tmp_path / "prompts.txt", Lines()
    config = load_config([], [f"prompts.source={file}"], {}).config
    file.write_text("a cat\none two three four five\n")
    assert [prompt.text for prompt in build_prompts(config, WORDS, console)] == ["a cat"]
    assert console.warnings == ["prompts: 1 of 2 exceed 4 tokens and are left out"]
    file.write_text("one two three four five\nsix seven eight nine ten\n")
    with pytest.raises(ConfigError, match="all 2 prompts exceed 4 tokens, none is left; shorten them$"):
        build_prompts(config, WORDS, console)
    lower = load_config([], [f"prompts.source={file}", "prompts.max_tokens=2"], {}).config
    with pytest.raises(ConfigError, match="exceed 2 tokens.*or raise prompts.max_tokens"):
        build_prompts(lower, WORDS, console)
