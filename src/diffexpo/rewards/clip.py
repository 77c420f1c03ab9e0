"""Text-image agreement by a CLIP model: CLIP score, the embedded judges, and PickScore's code."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer

from diffexpo.config.rewards.card import VIT_H
from diffexpo.config.rewards.pickscore import PICKSCORE
from diffexpo.rewards.dual_encoder import UNITS, DualEncoder, model_files, read_clip_model, read_processor
from diffexpo.rewards.weights import MODEL_FILES, find_folder, fingerprint, read_part

# PickScore's own repository holds only the network; its processor is this one's.
PROCESSORS = {PICKSCORE: VIT_H}


class ClipReward(DualEncoder):
    """cos(text, image), exp(logit_scale) * cos(text, image) or 100 cos(text, image), one number a row.

    Images go through PIL (8 bits, bicubic), whatever other image backends are installed. `path` is a
    CLIPModel folder or hub id; `base` that of its tokenizer and image processor, by default the model's own
    folder.

    Raises:
        MissingError: there is no such model, or its tokenizer or image processor is missing.
        RewardError: a file is damaged, or the weights are not those of a CLIPModel.
    """

    has_image_features = True  # the Vendi score measures these vectors

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
        self.scale = UNITS[scale]
        expected = "a CLIPModel folder, a hub id or `emoji:judge_train`"
        folder = find_folder(name, path, expected, key="path", patterns=MODEL_FILES)
        files = model_files(name, folder)
        base = base or PROCESSORS.get(path)
        processor = folder if base is None else find_folder(name, base, expected)
        model = read_clip_model(name, folder)  # first: it says whose a damaged config.json is
        prepare, tokenizer = read_processor(name, processor), read_part(name, processor, CLIPTokenizer)
        super().__init__(name, model, tokenizer, prepare, device=device, precision=precision, unit=scale)
        self.version = fingerprint(files, (folder, processor), scale=scale, precision=precision)
