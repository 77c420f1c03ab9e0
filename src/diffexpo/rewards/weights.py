"""Weights and their folders: found locally or on the hub, never unpickled, named by what is in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase

from diffexpo.bounded.texts import check_json_files, read_json
from diffexpo.config.rewards import RewardCard
from diffexpo.errors import MissingError, RewardError

Part = TypeVar("Part", bound=PreTrainedTokenizerBase | CLIPConfig | CLIPImageProcessorPil)
Model = TypeVar("Model", bound=torch.nn.Module)
Device = torch.device | str
LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)
# The patterns leave out the copies of other libraries that lie in many CLIP repositories.
MODEL_FILES = ("model*.safetensors", "*.json", "*.txt")
SETTINGS_FILES = ("*.json", "*.txt")
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Parts of a CLIPModel folder: what they are called, and the files of which one must be there. Newer libraries
# keep the image processor's settings inside processor_config.json.
PARTS: dict[type, tuple[str, tuple[str, ...]]] = {
    CLIPConfig: ("CLIPModel configuration", ("config.json",)),
    CLIPTokenizer: ("tokenizer", ("tokenizer_config.json",)),
    CLIPImageProcessorPil: ("image processor", ("preprocessor_config.json", "processor_config.json")),
}
# What decides a score besides the weights: configuration, tokenizer, image processor.
SETTINGS = (
    *("config.json", "med_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
)
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def find_folder(
    name: str, wanted: str, expected: str, *, key: str = "base", patterns: Sequence[str] = SETTINGS_FILES
) -> Path:
    """A local folder, or the files of a hub repository that match `patterns`, else a MissingError; `key` is
    the setting."""
    folder = Path(wanted).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(wanted):
        raise MissingError(f"reward {name!r}: {key}={wanted!r} is no folder; expected {expected}")
    try:
        return Path(snapshot_download(wanted, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"{key}={wanted!r} is no folder, and the hub did not give it ({error})"
        advice = "check the spelling, the network, or download it and name the folder"
        raise MissingError(f"reward {name!r}: {reason}; {advice}") from error


def find_weights(name: str, card: type[RewardCard], path: str | None) -> Path:
    """The one safetensors file of a type whose official weights are a pickle that its user converts.

    `path` is a `.safetensors` file, a folder with exactly one, or the hub id of such a repository. A
    MissingError for nothing, or a pickled file, says where the weights are found and how to convert them; a
    damaged file (RewardError) is found before anything else is looked for.
    """
    given, problem = Path(path or "").expanduser(), ""
    files = [given]
    if path is None:
        problem = f"no path to {card.path_is}"
    elif given.suffix in _PICKLED:
        problem = f"{given} is a pickled file, which is never read"
    elif given.suffix != ".safetensors":
        folder = find_folder(name, path, card.path_is, key="path", patterns=("*.safetensors", "*.json"))
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            problem = f"{folder} holds {len(files)} .safetensors files; expected one, or name the file"
    elif not given.is_file():
        problem = f"no file {given}"
    if problem:
        raise MissingError(f"reward {name!r}: {problem}; {obtain(card)}")
    with opened(name, files[0]):
        return files[0]


def obtain(card: type[RewardCard]) -> str:
    """Where a type's official weights are found, their licence, and how a pickle becomes safetensors."""
    text = f"official weights: {card.source}; licence: {card.licence}"
    if card.pickled_entry is None:
        return text
    return (
        f'{text}; convert once, where you trust the file: python -c "import torch, safetensors.torch as s; '
        f"d = torch.load('IN', map_location='cpu', weights_only=True){card.pickled_entry}; "
        f"s.save_file({{k: v.clone().contiguous() for k, v in d.items()}}, 'OUT.safetensors')\""
    )


@contextmanager
def opened(name: str, file: Path) -> Iterator[safe_open]:
    """An open safetensors file; RewardError if it is damaged (its header does not fit its length, say)."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = f"{file} is a damaged safetensors file ({error})"
        raise RewardError(f"reward {name!r}: {reason}; copy or download it again") from error


def read_tensors(name: str, file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    with opened(name, file) as tensors:
        # An opened file is no mapping: it has `keys` alone.
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118


def read_part(name: str, folder: Path, kind: type[Part]) -> Part:
    """A tokenizer, configuration or image processor of a folder: MissingError if there is none, RewardError
    if it cannot be read."""
    what, files = PARTS.get(kind, ("tokenizer", ()))
    if files and not any((folder / file).is_file() for file in files):
        raise MissingError(
            f"reward {name!r}: {folder / files[0]} is missing; save configuration, tokenizer and image "
            "processor next to the model, or name a base that has them"
        )
    try:
        check_json_files(folder)
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library that reads tokenizers raises whatever it stumbles over
        reason = f"the {what} of {folder} cannot be read ({error})"
        raise RewardError(f"reward {name!r}: {reason}; copy it again") from error


def read_settings(name: str, file: Path) -> dict[str, Any]:
    """The JSON object of a settings file; RewardError for a file that holds none."""
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise RewardError(f"reward {name!r}: {file} cannot be read ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise RewardError(f"reward {name!r}: {file} holds no JSON object; copy it again")
    return found


def fill(name: str, source: object, model: Model, state: Mapping[str, Tensor], kind: str) -> Model:
    """The model with weights loaded into it; RewardError unless they fit exactly."""
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    check_keys(name, source, wrong, [key for key in state if key not in own], kind)
    model.load_state_dict(state)
    return model


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The name that a weight has in another library: old names are replaced at the beginning, those with a
    leading dot anywhere."""
    for old, new in names.items():
        if old.startswith("."):
            key = key.replace(old, new)
        elif key.startswith(old):
            key = new + key.removeprefix(old)
    return key


def fingerprint(weights: Sequence[Path], folders: Iterable[Path], **settings: str) -> str:
    """SHA-256 of files of weights, the files in folders that decide a score besides them, and settings:
    scorers that may score differently differ in it."""
    digest = hashlib.sha256()
    others = [folder / file for folder in dict.fromkeys(folders) for file in SETTINGS]
    for file in [*weights, *(file for file in others if file.is_file())]:
        digest.update(f"{file.name}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    digest.update("".join(f"{key}={value}\n" for key, value in sorted(settings.items())).encode())
    return digest.hexdigest()


def check_keys(
    name: str, source: object, missing: Sequence[str], unexpected: Sequence[str], kind: str
) -> None:
    """Refuse weights of another layout with a RewardError that counts the wrong keys and names the first."""
    lacks = f"lacks {len(missing)} {kind} weights"
    has = f"has {len(unexpected)} weights that {kind} has not"
    for keys, what in ((missing, lacks), (unexpected, has)):
        if keys:
            advice = "it is another kind of model"
            raise RewardError(f"reward {name!r}: {source} {what} (first: {keys[0]}); {advice}")
