"""What checkers are taught, and that a trained one is written as the package reads it."""

from __future__ import annotations

from pathlib import Path

import torch

from diffexpo.rewards.scenes import LOOKS, NAMES, load_checker
from worlds.emoji.models import make_vae
from worlds.scenes import train_checker
from worlds.scenes.spoil import Labelled
from worlds.scenes.train_checker import CHECKERS, draw_labelled, targets_of


def test_targets_peak_at_the_centres_of_their_kind() -> None:
    targets = targets_of([[Labelled("key", "red", 18, 34, True), Labelled("hat", "blue", 50, 50, False)]])
    # Places stand every 4 pixels, the first at 2: (18, 34) is place (4, 8), (50, 50) place (12, 12).
    assert targets.heat[0, 0, 4, 8] == 1 and targets.heat[0, 1, 12, 12] == 1
    assert targets.heat[0, 0, 12, 12] < 1e-6 and targets.heat[0, 1, 4, 8] < 1e-6
    assert targets.names[0, 4, 8] == NAMES.index("key") and targets.looks[0, 4, 8] == LOOKS.index("red")
    assert targets.names[0, 12, 12] == -1


def test_images_of_one_key_are_the_same_and_of_two_checkers_others() -> None:
    images = draw_labelled(4, [1, 2])[0]
    assert torch.equal(images, draw_labelled(4, [1, 2])[0])
    assert not torch.equal(images, draw_labelled(4, [2, 2])[0])


def test_a_trained_checker_is_read_by_the_package(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train_checker, "POOL", 64)
    monkeypatch.setattr(train_checker.Errors, "measure", classmethod(lambda cls, network: cls(0, 0, 0, 0)))
    torch.manual_seed(0)
    vae = make_vae()
    for name, checker in CHECKERS.items():
        train_checker.train_checker(name, 2, tmp_path, vae)
        network, _ = load_checker(name, str(tmp_path / name))
        assert type(network).__name__.lower().startswith(checker.architecture)
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 2 + len(NAMES) + len(LOOKS), 16, 16)
