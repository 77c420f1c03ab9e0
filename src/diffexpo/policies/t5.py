"""T5 as a text encoder: its tokenizer, its states, and how many tokens of it a denoiser sees."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from diffexpo.config.schema import ModelConfig
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.policies.family import Loading
from diffexpo.policies.loading import ModelFolder, component_folder, read_json
from diffexpo.policies.text import check_vocabulary, count_tokens, load_tokenizer, tokenize

# A folder trained with another number of T5 tokens than its pipeline's default says so:
# {"max_sequence_length": 0}.
SETTINGS_FILE = "diffexpo.json"
LONGEST = 512


@dataclass(frozen=True, eq=False)
class T5Text:
    """A T5 encoder with its tokenizer, reading `length` tokens of a text; the rest is cut, less is padded."""

    tokenizer: T5TokenizerFast
    encoder: T5EncoderModel
    length: int
    device: torch.device

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the end mark included, before any cut."""
        return count_tokens(self.tokenizer, prompts)

    def encode(self, prompt: str, *, is_masked: bool = False) -> tuple[Tensor, Tensor]:
        """States (1, length, D) of one prompt and the mask (1, length) int64 of its tokens, 0 for padding.

        With `is_masked` the encoder does not look at the padding (PixArt); without, padding is text like any
        other, as in the pipelines of SD3 and FLUX.
        """
        tokens = tokenize(self.tokenizer, prompt, self.length)
        mask = tokens.attention_mask.to(self.device)
        with torch.no_grad():
            output = self.encoder(
                tokens.input_ids.to(self.device), attention_mask=mask if is_masked else None
            )
        return output[0], mask


def load_t5(ask: Loading, components: tuple[str, str], length: int) -> T5Text:
    """The T5 encoder of a folder.

    Args:
        ask: The folder, and where and how to hold the encoder.
        components: Subfolders of encoder and tokenizer.
        length: Tokens it reads, >= 1.
    Returns:
        Encoder and tokenizer, frozen, in eval mode.
    Raises:
        ConfigError: no token is read.
        MissingError: a component or a file of it is not there.
        PolicyError: damaged files, or a tokenizer of another model.
    """
    if length < 1:
        raise ConfigError(
            f"model.max_sequence_length={length}: T5 would read nothing; expected 1 to {LONGEST} (zero "
            "tokens in T5's place are model.drop_t5=true, for Stable Diffusion 3)"
        )
    tokenizer = load_t5_tokenizer(ask.folder, components[1])
    encoder = ask.network(components[0])
    check_vocabulary(ask.folder, tokenizer, encoder, (components[1], components[0]))
    return T5Text(tokenizer, encoder, length, ask.device)


def load_t5_tokenizer(folder: ModelFolder, component: str) -> T5TokenizerFast:
    """The T5 tokenizer of a folder, from its tokenizer.json; spiece.model alone needs the sentencepiece
    package.

    Raises:
        MissingError: component, file or package is not there.
        PolicyError: its files cannot be read.
    """
    path = component_folder(folder, component)
    has_only_model = not (path / "tokenizer.json").is_file() and (path / "spiece.model").is_file()
    if has_only_model and importlib.util.find_spec("sentencepiece") is None:
        raise MissingError(
            f"{path}: holds spiece.model and no tokenizer.json; expected tokenizer.json. Install the package "
            "sentencepiece, or make the file once where it is installed: "
            "T5TokenizerFast.from_pretrained(folder).save_pretrained(folder)"
        )
    return load_tokenizer(
        folder, component, "T5TokenizerFast", needs_file="" if has_only_model else "tokenizer.json"
    )


def read_sequence_length(folder: ModelFolder, model: ModelConfig, default: int) -> int:
    """Tokens of T5, or zeros in their place, that the denoiser sees.

    Args:
        folder: Its `diffexpo.json`, if there is one, says what the model was trained with.
        model: `max_sequence_length` goes before the file.
        default: The pipeline's own.
    Returns:
        A number from 0 to 512.
    Raises:
        PolicyError: the file holds no such number.
    """
    if model.max_sequence_length is not None:
        return model.max_sequence_length
    file = folder.path / SETTINGS_FILE
    if not file.is_file():
        return default
    count = read_json(file).get("max_sequence_length")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= LONGEST:
        raise PolicyError(f"{file}: max_sequence_length={count!r}; expected an integer from 0 to {LONGEST}")
    return count
