"""A CLIPModel as two functions to unit vectors; CLIP score, PickScore, HPS and the aesthetic predictors stand
on it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from diffexpo.errors import MissingError, RewardError
from diffexpo.rewards.images import check_lengths, to_bytes
from diffexpo.rewards.weights import PRECISIONS, check_header, check_keys

_log = logging.getLogger("diffexpo")
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

# The patterns leave out the copies of other libraries that lie in many CLIP repositories.
MODEL_FILES = ("model*.safetensors", "*.json", "*.txt")
SETTINGS_FILES = ("*.json", "*.txt")
LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)


class DualEncoder:
    """Unit vectors of images and texts.

    Rows are independent: texts are padded to a fixed length, so a vector does not depend on its batch beyond
    rounding. The towers run in `precision`, projections and normalisation in float32.

    Args:
        name: The reward's name, for messages.
        model: A CLIPModel; its towers are moved and cast.
        tokenizer: Its tokenizer.
        prepare: Images (B,3,H,W) in [0,1] to pixel values.
        device: Where it runs.
        precision: A key of `PRECISIONS`.
        clean: Applied to each text before the tokenizer.
    """

    def __init__(
        self,
        name: str,
        model: CLIPModel,
        tokenizer: CLIPTokenizer | None,
        prepare: Callable[[Tensor], Tensor],
        device: torch.device | str,
        precision: str = "float32",
        clean: Callable[[str], str] = str,
    ) -> None:
        self.name = name
        self._dtype = PRECISIONS[precision]
        self._model = model.to(device).eval().requires_grad_(False)
        for tower in (model.vision_model, model.text_model):
            tower.to(self._dtype)
        self._tokenizer, self._prepare, self._clean = tokenizer, prepare, clean
        self._max_tokens = model.config.text_config.max_position_embeddings
        if tokenizer is not None:
            self._max_tokens = min(tokenizer.model_max_length, self._max_tokens)
        self._cut: set[str] = set()

    @property
    def width(self) -> int:
        """Length of the vectors."""
        return int(self._model.config.projection_dim)

    @property
    def num_cut_prompts(self) -> int:
        """Distinct prompts so far that were longer than the text encoder takes and were cut."""
        return len(self._cut)

    def logit_scale(self) -> Tensor:
        """exp of the stored logarithm, scalar."""
        return self._model.logit_scale.float().exp()

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos(text, image) (B,) of each row."""
        check_lengths(self.name, images, prompts)
        if len(images) == 0:
            return torch.zeros(0, device=self._model.device)
        return (self.embed_prompts(prompts) * self.embed_images(images)).sum(dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B,3,H,W) in [0,1]; also what the Vendi score measures."""
        pixels = self._prepare(images).to(self._model.device, self._dtype)
        with torch.no_grad():
            pooled = self._model.vision_model(pixel_values=pixels).pooler_output
            return _unit(self._model.visual_projection(pooled.float()))

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts; each distinct text runs once."""
        assert self._tokenizer is not None  # only scorers that read no prompt have none
        distinct = list(dict.fromkeys(prompts))
        texts = [self._clean(prompt) for prompt in distinct]
        self._count_cut(distinct, texts)
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=self._max_tokens, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        with torch.no_grad():
            pooled = self._model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            vectors = _unit(self._model.text_projection(pooled.float()))
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return vectors[[rows[prompt] for prompt in prompts]]

    def _count_cut(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        lengths = [len(ids) for ids in self._tokenizer(list(texts), verbose=False).input_ids]
        too_long = {
            prompt for prompt, length in zip(prompts, lengths, strict=True) if length > self._max_tokens
        }
        for prompt in sorted(too_long - self._cut):
            _log.warning("reward %r: prompt cut to %d tokens: %.60r", self.name, self._max_tokens, prompt)
        self._cut |= too_long


def read_clip_model(name: str, folder: Path) -> CLIPModel:
    """A CLIPModel of a folder, float32.

    Raises:
        MissingError: no safetensors weights.
        RewardError: damaged, or another kind of model.
    """
    model_files(name, folder)
    try:
        model, report = CLIPModel.from_pretrained(
            str(folder),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise RewardError(
            f"reward {name!r}: {folder} cannot be loaded as a CLIPModel ({error}); expected the PickScore "
            "layout"
        ) from error
    wrong = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    check_keys(name, folder, wrong, (), "CLIPModel")
    return model


def model_files(name: str, folder: Path) -> list[Path]:
    """The weight files of a CLIPModel folder, each with a header that fits its length.

    Raises:
        MissingError: there is none.
        RewardError: one is damaged.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise MissingError(
            f"reward {name!r}: {folder} holds no model.safetensors (pickled `.bin` files are not read)"
        )
    for file in files:
        check_header(name, file)
    return files


def read_clip_config(name: str, folder: Path) -> CLIPConfig:
    """Sizes and activations of a CLIPModel folder.

    Raises:
        MissingError: no config.json.
        RewardError: not the configuration of a CLIPModel.
    """
    _need(name, folder, ("config.json",))
    try:
        config = CLIPConfig.from_pretrained(str(folder), local_files_only=True)
    except LOAD_ERRORS as error:
        raise RewardError(
            f"reward {name!r}: {folder / 'config.json'} is no CLIPModel configuration ({error})"
        ) from error
    return config


def read_tokenizer(name: str, folder: Path) -> CLIPTokenizer:
    """The tokenizer of a folder.

    Raises:
        MissingError: its files are not there.
        RewardError: they cannot be read.
    """
    _need(name, folder, ("tokenizer_config.json",))
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except LOAD_ERRORS as error:
        raise RewardError(
            f"reward {name!r}: the tokenizer of {folder} cannot be read ({error}); copy it again"
        ) from error


def read_processor(name: str, folder: Path) -> Callable[[Tensor], Tensor]:
    """A function from images (B,3,H,W) in [0,1] to pixel values, as the folder's image processor says,
    through PIL.

    Raises:
        MissingError: its file is not there.
        RewardError: it cannot be read.
    """
    # Newer libraries keep the image processor's settings inside processor_config.json.
    _need(name, folder, ("preprocessor_config.json", "processor_config.json"))
    try:
        # The class is named because CLIPImageProcessor means another backend where torchvision is installed.
        processor = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except LOAD_ERRORS as error:
        raise RewardError(
            f"reward {name!r}: the image processor of {folder} cannot be read ({error}); copy it again"
        ) from error

    def prepare(images: Tensor) -> Tensor:
        pil_images = [Image.fromarray(pixels) for pixels in to_bytes(images)]
        return processor(images=pil_images, return_tensors="pt").pixel_values

    return prepare


def _need(name: str, folder: Path, files: Sequence[str]) -> None:
    if not any((folder / file).is_file() for file in files):
        raise MissingError(
            f"reward {name!r}: {folder / files[0]} is missing; save configuration, tokenizer and image "
            "processor beside the model, or name a base that has them"
        )


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
