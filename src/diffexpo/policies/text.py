"""Text encoders of all families: their tokenizers, what they say of a text, and how much of it a denoiser
sees."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffexpo.bounded.texts import check_json_files
from diffexpo.config.schema import ModelConfig
from diffexpo.errors import MissingError, PolicyError
from diffexpo.policies.loading import ModelFolder, component_folder, incomplete, read_json

# A folder trained with another number of T5 tokens than its pipeline's default says so:
# {"max_sequence_length": 0}.
SETTINGS_FILE = "diffexpo.json"
LONGEST = 512
SHORTEST = 3
"""Tokens of the shortest text that a tokenizer may cut to: both marks and one between them."""
CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files of CLIP's tokenizer in the layouts of new and old libraries."""
TOKENIZERS = {"T5EncoderModel": "T5TokenizerFast", "Gemma2Model": "GemmaTokenizerFast"}
"""Class of a text encoder -> class of its tokenizer, where that is not CLIP's."""


def load_tokenizer(model: ModelFolder, component: str, encoder_class: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a text encoder, from its tokenizer.json unless it is CLIP's.

    Raises:
        MissingError: component, file or package is not there.
        PolicyError: its files cannot be read.
    """
    folder = component_folder(model, component)
    class_name = TOKENIZERS.get(encoder_class, "CLIPTokenizer")
    # Without a file transformers would hand out an empty tokenizer of some classes.
    if class_name == "CLIPTokenizer" and not any(
        all((folder / name).is_file() for name in names) for names in CLIP_FILES
    ):
        raise incomplete(folder / CLIP_FILES[0][0])
    if class_name != "CLIPTokenizer" and not (folder / "tokenizer.json").is_file():
        if class_name != "T5TokenizerFast" or not (folder / "spiece.model").is_file():
            raise incomplete(folder / "tokenizer.json")
        if importlib.util.find_spec("sentencepiece") is None:
            raise MissingError(
                f"{folder}: holds spiece.model and no tokenizer.json; expected tokenizer.json. Install the "
                "package sentencepiece, or make the file once where it is installed: "
                "T5TokenizerFast.from_pretrained(folder).save_pretrained(folder)"
            )
    try:
        check_json_files(folder)
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library that reads tokenizers raises whatever it stumbles over
        why = f"{class_name} cannot be loaded ({error}); copy or download it again"
        raise PolicyError(f"{folder}: {why}") from error


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, where: str) -> None:
    """Bring a tokenizer that does not say how long a text may be, or says more than its encoder reads, to
    what that reads.

    Raises:
        PolicyError: it has a token that the encoder does not know, no token to pad with, or a longest text
            that is no length.
    """
    known, positions = encoder.config.vocab_size, encoder.config.to_dict().get("max_position_embeddings")
    strange = {number: token for token, number in tokenizer.get_vocab().items() if number >= known}
    if strange:
        number = min(strange)
        raise PolicyError(
            f"{where}: has the token {strange[number]!r}, number {number}, and its text encoder knows "
            f"{known}; add it there too (resize_token_embeddings), or take it out of the tokenizer"
        )
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < SHORTEST:
        raise PolicyError(
            f"{where}: model_max_length is {longest!r:.40} in tokenizer_config.json; expected an integer of "
            f"at least {SHORTEST}"
        )
    if tokenizer.pad_token is None:
        raise PolicyError(f"{where}: has no padding token; name one (pad_token) in tokenizer_config.json")
    if positions is not None:
        tokenizer.model_max_length = min(longest, positions)


def count_tokens(tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Sequence[str]) -> list[int]:
    """Length of each prompt in tokens, start and end marks included, before any truncation; the largest
    number of all tokenizers."""
    if not prompts:
        return []
    ids = [tokenizer(list(prompts), truncation=False, verbose=False).input_ids for tokenizer in tokenizers]
    return [max(map(len, of_prompt)) for of_prompt in zip(*ids, strict=True)]


def encode_text(
    tokenizer: PreTrainedTokenizerBase,
    encoder: PreTrainedModel,
    text: str,
    length: int | None = None,
    *,
    is_masked: bool = False,
    **options: Any,
) -> tuple[Any, Tensor]:
    """The encoder's output for one text, and the mask (1, length) int64 of its tokens, 0 for padding.

    Args:
        text: The rest is cut, less is padded.
        length: Number of tokens; None is the tokenizer's own.
        is_masked: The encoder does not look at the padding; otherwise padding is text like any other.
    """
    tokens = tokenizer(
        [text],
        padding="max_length",
        max_length=tokenizer.model_max_length if length is None else length,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)
    mask = tokens.attention_mask
    with torch.no_grad():
        return encoder(tokens.input_ids, attention_mask=mask if is_masked else None, **options), mask


def clip_states(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    encoders: Sequence[PreTrainedModel],
    prompt: str,
    length: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Penultimate states (1, length, sum of widths) of CLIP encoders, and the first output of each."""
    outputs = [
        encode_text(tokenizer, encoder, prompt, length, output_hidden_states=True)[0]
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return states, [output[0] for output in outputs]


def read_sequence_length(folder: Path, model: ModelConfig, default: int) -> int:
    """Tokens of T5, or zeros in their place, that the denoiser sees, 0 to 512: of the settings, else of the
    folder's `diffexpo.json`, else the pipeline's own, which is 0 for a family without such a length.

    Raises:
        PolicyError: the file holds no such number.
    """
    file = folder / SETTINGS_FILE
    if default and model.max_sequence_length is not None:
        return model.max_sequence_length
    if not default or not file.is_file():
        return default
    count = read_json(file).get("max_sequence_length")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= LONGEST:
        raise PolicyError(f"{file}: max_sequence_length={count!r}; expected an integer from 0 to {LONGEST}")
    return count
