"""The settings of one reward to serve, from a file or from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffexpo.assembly.serving import open_server, read_reward
from diffexpo.errors import ConfigError, MissingError


def test_a_reward_is_called_by_its_type_unless_named(tmp_path: Path) -> None:
    assert read_reward(None, {"type": "jpeg_compressibility"}).name == "jpeg_compressibility"
    assert read_reward(None, {"type": "brisque", "name": "clean"}).name == "clean"
    for text in (
        "{type: python, path: 'a.py:f', name: mine}",
        "- {type: python, path: 'a.py:f', name: mine}",
    ):
        (tmp_path / "reward.yaml").write_text(text)
        reward = read_reward(tmp_path / "reward.yaml", {})
        assert (reward.name, reward.type, reward.path) == ("mine", "python", "a.py:f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just words", "holds no single reward"),
        ("- {type: clip}\n- {type: clip}", "holds no single reward"),
        ("type: clip", "path is empty"),
        ("type: klip", "Did you mean clip"),
        ("type: jpeg_compressibility\nwieght: 1", r"wieght is not a setting \(from .*reward.yaml\)"),
        ("type: [", "is not valid YAML"),
        ("{type: vlm, path: 'http://h/v1', vlm: {mode: pairwise}}", "pairwise"),
    ],
)
def test_wrong_files_are_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as found:
        read_reward(tmp_path / "reward.yaml", {})
    assert "--set" not in str(found.value)


def test_a_file_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_reward(tmp_path / "absent.yaml", {})
    with pytest.raises(MissingError, match="no file"):
        open_server(
            read_reward(None, {"type": "python", "path": "absent.py:f"}),
            device="cpu",
            host="127.0.0.1",
            port=0,
            batch_size=8,
            wait_ms=1.0,
            max_mib=1.0,
        )
