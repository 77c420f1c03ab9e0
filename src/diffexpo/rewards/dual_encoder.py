"""A CLIPModel as a scorer: CLIP score, PickScore, HPS and the aesthetic predictors stand on it."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BatchEncoding,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from diffexpo.errors import MissingError, RewardError
from diffexpo.phases import phase
from diffexpo.rewards.images import check_lengths, to_bytes
from diffexpo.rewards.weights import LOAD_ERRORS, PRECISIONS, check_keys, opened, read_part

_log = logging.getLogger("diffexpo")
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

UNITS = {"raw": "cosine", "percent": "100 x cosine", "logit": "logit-scaled cosine"}


class Texts:
    """Texts as tokens of one fixed length, so that a score does not depend on the other texts of its batch.

    Texts of more than `max_tokens` are cut and counted; `clean` is applied to each before the tokenizer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, clean: Callable[[str], str] = str
    ) -> None:
        self.max_tokens = max_tokens
        self.cut: set[str] = set()
        self._tokenizer, self._clean = tokenizer, clean

    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        """Token ids and attention masks of texts."""
        return self._tokenizer(
            [self._clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )

    def note_cut(self, prompts: Sequence[str]) -> list[str]:
        """Count the prompts that are too long; the new ones among them, sorted."""
        unknown = sorted(set(prompts) - self.cut)
        lengths = [len(self._tokenizer(self._clean(prompt), verbose=False).input_ids) for prompt in unknown]
        new = [prompt for prompt, length in zip(unknown, lengths, strict=True) if length > self.max_tokens]
        self.cut.update(new)
        return new


class NetworkReward(ABC):
    """A scorer whose network runs here; `texts` is None where prompts are not read."""

    def __init__(self, name: str, texts: Texts | None) -> None:
        self.name, self.texts = name, texts

    @property
    def num_cut_prompts(self) -> int:
        """Distinct prompts so far that were longer than the text encoder takes and were cut."""
        return len(self.texts.cut) if self.texts else 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B,3,H,W) in [0,1] for their prompts."""
        check_lengths(self.name, images, prompts)
        return self._score(images, prompts).cpu() if len(images) else torch.zeros(0)

    @abstractmethod
    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of at least one image."""


class DualEncoder(NetworkReward):
    """Scores by the cosine of a text's and an image's vector, in a unit of `UNITS`.

    Rows are independent: the text of row i meets the image of row i only. The towers of the model are moved
    and cast, and run in `precision`, a key of `PRECISIONS`; projections and normalisation run in float32.
    `tokenizer` is None where prompts are not read, `prepare` turns images (B,3,H,W) in [0,1] into pixel
    values, and `clean` is applied to each text before the tokenizer.
    """

    def __init__(
        self,
        name: str,
        model: CLIPModel,
        tokenizer: CLIPTokenizer | None,
        prepare: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str,
        precision: str,
        unit: str = "raw",
        clean: Callable[[str], str] = str,
    ) -> None:
        texts = None
        if tokenizer is not None:
            positions = int(model.config.text_config.max_position_embeddings)
            texts = Texts(tokenizer, min(tokenizer.model_max_length, positions), clean)
        super().__init__(name, texts)
        self._unit, self._dtype, self._prepare = unit, PRECISIONS[precision], prepare
        self._model = model.to(device).eval().requires_grad_(False)
        for tower in (model.vision_model, model.text_model):
            tower.to(self._dtype)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        factor = {"raw": 1.0, "percent": 100.0, "logit": self._model.logit_scale.float().exp()}[self._unit]
        return factor * (self.embed_prompts(prompts) * self.embed_images(images)).sum(dim=-1)

    @phase("scoring images")
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B,3,H,W) in [0,1]."""
        pixels = self._prepare(images).to(self._model.device, self._dtype)
        with torch.no_grad():
            pooled = self._model.vision_model(pixel_values=pixels).pooler_output
            return _unit(self._model.visual_projection(pooled.float()))

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts; each distinct text runs once."""
        assert self.texts is not None  # only scorers that read no prompt have none
        distinct = list(dict.fromkeys(prompts))
        most = self.texts.max_tokens
        for prompt in self.texts.note_cut(distinct):
            _log.warning("reward %r: prompt cut to %d tokens: %.60r", self.name, most, prompt)
        tokens = self.texts.tokens(distinct).to(self._model.device)
        with torch.no_grad():
            read = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            vectors = _unit(self._model.text_projection(read.pooler_output.float()))
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return vectors[[rows[prompt] for prompt in prompts]]


def read_clip_model(name: str, folder: Path) -> CLIPModel:
    """A CLIPModel of a folder (whose `model_files` are there), float32; RewardError if it is none."""
    try:
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        model, report = CLIPModel.from_pretrained(str(folder), dtype=torch.float32, **options)
    except LOAD_ERRORS as error:
        reason = f"{folder} cannot be loaded as a CLIPModel ({error})"
        raise RewardError(f"reward {name!r}: {reason}; expected the PickScore layout") from error
    wrong = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    check_keys(name, folder, wrong, (), "CLIPModel")
    return model


def model_files(name: str, folder: Path) -> list[Path]:
    """The weight files of a CLIPModel folder; MissingError without any, RewardError if one is damaged."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        what = "model.safetensors (pickled `.bin` files are not read)"
        raise MissingError(f"reward {name!r}: {folder} holds no {what}")
    for file in files:
        with opened(name, file):
            pass
    return files


def read_processor(name: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from images (B,3,H,W) in [0,1] to pixel values, by the folder's image processor and PIL."""
    # The class is named because CLIPImageProcessor means another backend where torchvision is installed.
    processor = read_part(name, folder, CLIPImageProcessorPil)

    def prepare(images: Tensor) -> Tensor:
        pil_images = [Image.fromarray(pixels) for pixels in to_bytes(images)]
        return processor(images=pil_images, return_tensors="pt").pixel_values

    return prepare


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
