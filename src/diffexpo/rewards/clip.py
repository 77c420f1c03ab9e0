"""Text-image agreement by a CLIP model in the PickScore layout."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.base import to_bytes

_log = logging.getLogger("diffexpo")
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

# PickScore's own repository holds only the network; its processor is this one's.
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)


class ClipReward:
    """exp(logit_scale) * cos(text, image), one number a row.

    Rows are independent: the text of row i meets the image of row i only, and texts are padded to a fixed
    length, so a score does not depend on its batch. Images go through PIL (8 bits, bicubic), whatever other
    image backends are installed.

    Args:
        name: Name in metrics.
        folder_or_id: CLIPModel folder (with tokenizer and image processor) or hub id.
        device: Where it runs; always float32.
    Raises:
        MissingError: no such model, or tokenizer or image processor files are not there.
        RewardError: damaged file, not a CLIP model, weights that do not fit.
    """

    scale = "logit-scaled cosine"

    def __init__(self, name: str, folder_or_id: str, device: torch.device | str = "cpu") -> None:
        self.name = name
        folder = _resolve(name, folder_or_id, weights=True)
        processor = folder
        if folder_or_id in PROCESSORS:
            processor = _resolve(name, PROCESSORS[folder_or_id], weights=False)
        self.version = _check_files(name, folder)
        # Newer libraries keep the image processor's settings inside processor_config.json.
        for needed in (("preprocessor_config.json", "processor_config.json"), ("tokenizer_config.json",)):
            if not any((processor / file).is_file() for file in needed):
                raise MissingError(
                    f"reward {name!r}: {processor / needed[0]} is missing; save tokenizer and image "
                    "processor beside the model"
                )
        try:
            model, report = CLIPModel.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            self._processor = CLIPImageProcessorPil.from_pretrained(str(processor), local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(str(processor), local_files_only=True)
        except _LOAD_ERRORS as error:
            raise RewardError(
                f"reward {name!r}: {folder} cannot be loaded as a CLIPModel ({error}); expected the "
                "PickScore layout"
            ) from error
        wrong = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
        if wrong:
            raise RewardError(
                f"reward {name!r}: {folder} lacks {len(wrong)} CLIPModel weights (first: {wrong[0]}); it is "
                "another kind of model"
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._max_tokens = min(
            self._tokenizer.model_max_length, model.config.text_config.max_position_embeddings
        )
        self._cut: set[str] = set()

    @property
    def num_cut_prompts(self) -> int:
        """Distinct prompts so far that were longer than the text encoder takes and were cut."""
        return len(self._cut)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts."""
        if len(images) != len(prompts):
            raise RewardError(f"reward {self.name!r}: {len(images)} images but {len(prompts)} prompts")
        if len(images) == 0:
            return torch.zeros(0)
        text, image = self.embed_prompts(prompts), self.embed_images(images)
        return (self._model.logit_scale.exp() * (text * image).sum(dim=-1)).float().cpu()

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B,3,H,W) in [0,1]; also what the Vendi score measures."""
        pictures = [Image.fromarray(picture) for picture in to_bytes(images)]
        pixels = self._processor(images=pictures, return_tensors="pt").pixel_values
        with torch.no_grad():
            output = self._model.get_image_features(pixel_values=pixels.to(self._model.device))
        # transformers 5 returns a record; the projected vector is its pooler_output.
        return _unit(output.pooler_output)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts; each distinct text runs once."""
        distinct = list(dict.fromkeys(prompts))
        lengths = [len(ids) for ids in self._tokenizer(distinct, verbose=False).input_ids]
        too_long = {
            prompt for prompt, length in zip(distinct, lengths, strict=True) if length > self._max_tokens
        }
        for prompt in sorted(too_long - self._cut):
            _log.warning("reward %r: prompt cut to %d tokens: %.60r", self.name, self._max_tokens, prompt)
        self._cut |= too_long
        tokens = self._tokenizer(
            distinct, padding="max_length", max_length=self._max_tokens, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        with torch.no_grad():
            output = self._model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return _unit(output.pooler_output)[[rows[prompt] for prompt in prompts]]


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _resolve(name: str, folder_or_id: str, *, weights: bool) -> Path:
    folder = Path(folder_or_id).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", folder_or_id):
        raise MissingError(
            f"reward {name!r}: path={folder_or_id!r} is no folder; expected a CLIPModel folder, a hub id or "
            "`emoji:judge_train`"
        )
    patterns = ["*.json", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(folder_or_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingError(
            f"reward {name!r}: path={folder_or_id!r} is no folder, and the hub did not give it ({error}); "
            "check the spelling, the network, or download it and name the folder"
        ) from error


def _check_files(name: str, folder: Path) -> str:
    """sha256 over the weight files, after each header was read whole."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise MissingError(
            f"reward {name!r}: {folder} holds no model.safetensors (pickled `.bin` files are not read)"
        )
    digest = hashlib.sha256()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise RewardError(
                f"reward {name!r}: {file} is a damaged safetensors file ({error}); copy or download it again"
            ) from error
        digest.update(f"{file.name}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
