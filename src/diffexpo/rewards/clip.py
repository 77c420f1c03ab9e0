"""Text-image agreement by a CLIP model: CLIP score, the embedded judges, and PickScore's code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffexpo.config.rewards.card import VIT_H
from diffexpo.config.rewards.pickscore import PICKSCORE
from diffexpo.phases import phase
from diffexpo.rewards.dual_encoder import (
    MODEL_FILES,
    SETTINGS_FILES,
    DualEncoder,
    model_files,
    read_clip_model,
    read_processor,
    read_tokenizer,
)
from diffexpo.rewards.weights import find_folder, fingerprint, settings_files

# PickScore's own repository holds only the network; its processor is this one's.
PROCESSORS = {PICKSCORE: VIT_H}
UNITS = {"raw": "cosine", "percent": "100 x cosine", "logit": "logit-scaled cosine"}


class ClipReward:
    """cos(text, image), exp(logit_scale) * cos(text, image) or 100 cos(text, image), one number a row.

    Rows are independent: the text of row i meets the image of row i only, and texts are padded to a fixed
    length, so a score does not depend on its batch. Images go through PIL (8 bits, bicubic), whatever other
    image backends are installed.

    Args:
        name: Name in metrics.
        path: CLIPModel folder or hub id.
        device: Where it runs.
        base: Folder or hub id of tokenizer and image processor; None: the model's own folder.
        scale: "logit", "raw" or "percent".
        precision: "float32", "float16" or "bfloat16", of the towers.
    Raises:
        MissingError: no such model, or tokenizer or image processor files are not there.
        RewardError: damaged file, not a CLIP model, weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        path: str,
        device: torch.device | str = "cpu",
        *,
        base: str | None = None,
        scale: str = "logit",
        precision: str = "float32",
    ) -> None:
        self.name = name
        self.scale, self._unit = UNITS[scale], scale
        expected = "a CLIPModel folder, a hub id or `emoji:judge_train`"
        folder = find_folder(name, path, key="path", patterns=MODEL_FILES, expected=expected)
        files = model_files(name, folder)
        processor = folder
        base = base or PROCESSORS.get(path)
        if base is not None:
            processor = find_folder(name, base, key="base", patterns=SETTINGS_FILES, expected=expected)
        prepare = read_processor(name, processor)
        self._encoder = DualEncoder(
            name,
            read_clip_model(name, folder),
            read_tokenizer(name, processor),
            prepare,
            device,
            precision,
        )
        files += settings_files(*dict.fromkeys((folder, processor)))
        self.version = fingerprint(files, {"scale": scale, "precision": precision})

    @property
    def num_cut_prompts(self) -> int:
        """Distinct prompts so far that were longer than the text encoder takes and were cut."""
        return self._encoder.num_cut_prompts

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts."""
        return scaled(self._encoder.cosines(images, prompts), self._unit, self._encoder.logit_scale()).cpu()

    # The Vendi score measures these vectors.
    has_image_features = True

    @phase("scoring images")
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B,3,H,W) in [0,1]."""
        return self._encoder.embed_images(images)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts; each distinct text runs once."""
        return self._encoder.embed_prompts(prompts)


def scaled(cosine: Tensor, scale: str, logit_scale: Tensor) -> Tensor:
    """Cosines (B,) in a unit of `UNITS`; `logit_scale` is exp of the stored logarithm."""
    factor = {"raw": 1.0, "percent": 100.0, "logit": logit_scale}[scale]
    return factor * cosine
