"""What text encoders of all families share: reading tokenizers, counting tokens, encoding with CLIP, and
moving the encoders out of the device's memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers import BatchEncoding, CLIPTokenizer, PreTrainedTokenizerBase

from diffexpo.errors import MissingError, PolicyError
from diffexpo.policies.loading import LOAD_ERRORS, ModelFolder, component_folder

Tokenizer = PreTrainedTokenizerBase


def load_tokenizer(
    model: ModelFolder, component: str, class_name: str = "CLIPTokenizer", *, needs_file: str = ""
) -> Tokenizer:
    """A tokenizer of the folder.

    Args:
        model: The folder.
        component: Subfolder name.
        class_name: A tokenizer class of transformers.
        needs_file: A file that must be there. Without this check transformers would hand out an empty
            tokenizer for some classes.
    Raises:
        MissingError: the component or the file is not there.
        PolicyError: its files cannot be read.
    """
    folder = component_folder(model, component)
    if needs_file and not (folder / needs_file).is_file():
        raise MissingError(
            f"{folder / needs_file}: file is missing; the model folder is incomplete, copy or download it "
            "again"
        )
    try:
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
    except (*LOAD_ERRORS, ImportError) as error:
        raise PolicyError(
            f"{folder}: {class_name} cannot be loaded ({error}); copy or download it again"
        ) from error


def check_vocabulary(
    folder: ModelFolder, tokenizer: Tokenizer, encoder: nn.Module, names: tuple[str, str]
) -> None:
    """Refuse a tokenizer of another model; `names` say in words what tokenizer and encoder are.

    Raises:
        PolicyError: it has tokens that the encoder does not know.
    """
    if len(tokenizer) > encoder.config.vocab_size:
        raise PolicyError(
            f"{folder.path}: {names[0]} has {len(tokenizer)} tokens, {names[1]} knows "
            f"{encoder.config.vocab_size}; the components belong to different models"
        )


def count_tokens(tokenizers: Tokenizer | Sequence[Tokenizer], prompts: Sequence[str]) -> list[int]:
    """Length of each prompt in tokens, start and end marks included, before any truncation; of several
    tokenizers the largest number counts."""
    if not prompts:
        return []
    several = tokenizers if isinstance(tokenizers, Sequence) else [tokenizers]
    ids = [tokenizer(list(prompts), truncation=False, verbose=False).input_ids for tokenizer in several]
    return [max(map(len, of_prompt)) for of_prompt in zip(*ids, strict=True)]


def tokenize(tokenizer: Tokenizer, prompt: str, length: int | None = None) -> BatchEncoding:
    """One prompt's tokens and mask, (1, length): the rest is cut, less is padded; by default the tokenizer's
    own length."""
    return tokenizer(
        [prompt],
        padding="max_length",
        max_length=tokenizer.model_max_length if length is None else length,
        truncation=True,
        return_tensors="pt",
    )


def clip_states(
    tokenizers: Sequence[CLIPTokenizer],
    encoders: Sequence[nn.Module],
    prompt: str,
    device: torch.device,
    length: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Penultimate states (1, length, sum of widths) of CLIP encoders, and the first output of each."""
    states, first = [], []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        tokens = tokenize(tokenizer, prompt, length)
        with torch.no_grad():
            output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        first.append(output[0])
    return torch.cat(states, dim=-1), first


def move_modules(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Move networks that are on another device."""
    for module in modules:
        if next(module.parameters()).device != device:
            module.to(device)
