"""The average of two bases lies between them, weight by weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worlds.scenes.average import TRAINED, average_bases, renumbered
from worlds.scenes.models import make_tokenizer


def base(folder: Path, value: float) -> Path:
    for name in TRAINED:
        (folder / name).parent.mkdir(parents=True)
        save_file({"a": torch.full((2, 3), value), "b": torch.full((4,), -value).half()}, folder / name)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_weights_are_averaged_weight_by_weight(tmp_path: Path) -> None:
    average_bases(base(tmp_path / "one", 1.0), base(tmp_path / "two", 3.0), 0.25, tmp_path / "mean")
    for name in TRAINED:
        weights = load_file(tmp_path / "mean" / name)
        assert torch.equal(weights["a"], torch.full((2, 3), 1.5))
        assert torch.equal(weights["b"], torch.full((4,), -1.5).half())
    assert (tmp_path / "mean" / "model_index.json").read_text() == "{}"


def test_a_base_of_another_shape_is_no_partner(tmp_path: Path) -> None:
    other = base(tmp_path / "two", 3.0)
    save_file({"a": torch.zeros(5, 5), "b": torch.zeros(4)}, other / TRAINED[0])
    with pytest.raises(RuntimeError):
        average_bases(base(tmp_path / "one", 1.0), other, 0.5, tmp_path / "mean")


def test_words_are_told_apart_by_their_tokens() -> None:
    rows = torch.tensor([[0.0], [1.0], [2.0]])
    old, new = {"bell": 0, "hat": 1, "key": 2}, {"key": 0, "bell": 1, "hat": 2}
    assert renumbered(rows, old, new).flatten().tolist() == [2.0, 0.0, 1.0]
