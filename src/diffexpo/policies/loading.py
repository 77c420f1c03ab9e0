"""Reading a diffusers folder by components: every broken input is a message that names the file, never a
silent random weight."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from diffexpo.bounded import texts as bounded
from diffexpo.errors import ConfigError, MissingError, PolicyError

# Folders that no family reads: not downloaded.
NOT_READ = ("safety_checker/*", "feature_extractor/*", "image_encoder/*", "vae_1_0/*")
OTHER_VARIANTS = ("fp16", "bf16", "fp32", "non_ema", "ema")
LAYERS = re.compile("layers|blocks|depth")
MOST_LAYERS = 1000
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
LOAD_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers pipeline on disk: its folder, its model_index.json and which weight files count."""

    path: Path
    index: Mapping[str, Any]
    variant: str | None

    @property
    def pipeline_class(self) -> str:
        return str(self.index.get("_class_name"))

    def has(self, component: str) -> bool:
        """Whether model_index.json declares the component (a [null, null] entry does not)."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def resolve_folder(folder_or_id: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a model: itself when it exists, else a hub download of configs, tokenizers and
    safetensors of the chosen variant.

    Raises:
        MissingError: neither a folder nor a hub model that can be reached; a gated model without access; no
            such revision.
        ConfigError: a revision of a local folder.
    """
    folder = Path(folder_or_id).expanduser()
    if folder.exists():
        if revision is not None:
            raise ConfigError(
                f"model.revision={revision}: {folder} is a local folder, which has one state only; expected "
                "null, or a hub id in model.path"
            )
        return folder
    if not HUB_ID.fullmatch(folder_or_id):
        raise MissingError(
            f"model.path={folder_or_id!r}: no such folder; expected a diffusers folder, a hub id "
            "`owner/name`, a run (RUN@2: its second iterate) or an embedded model (`scenes:diffusion`)"
        )
    allow, ignore = download_patterns(variant)
    try:
        return Path(
            snapshot_download(folder_or_id, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except (OSError, ValueError) as error:
        raise MissingError(_why_not_there(folder_or_id, revision, error)) from error


def download_patterns(variant: str | None) -> tuple[list[str], list[str]]:
    """Patterns (allowed, ignored) of a hub model's files: configurations, tokenizers and the component
    folders' safetensors of the variant (None: the plain one) are fetched."""
    weights = f"*/*.{variant}*.safetensors" if variant else "*/*.safetensors"
    others = [] if variant else [f"*.{name}*.safetensors" for name in OTHER_VARIANTS]
    return ["*.json", "*.txt", "*.model", weights], [*NOT_READ, *others]


def _why_not_there(name: str, revision: str | None, error: Exception) -> str:
    """What the hub's refusal means and what to do about it."""
    if isinstance(error, RevisionNotFoundError):
        return (
            f"model.revision={revision!r}: {name!r} has no such branch, tag or commit; expected one that its "
            "page on the hub lists, or null for the newest"
        )
    if isinstance(error, GatedRepoError):
        why = (
            "a gated model, and this account has no access; accept its licence on "
            f"https://huggingface.co/{name} and log in with `hf auth login` (or set HF_TOKEN)"
        )
    elif isinstance(error, RepositoryNotFoundError):
        why = (
            "not a local folder, and the hub has no such model or hides it from this account; check the "
            "spelling, or log in with `hf auth login` if it is private"
        )
    else:
        said = " ".join(str(error).split())
        why = (
            f"not a local folder, and the hub did not give it ({said}); check the spelling, the network, or "
            "download it and name the folder"
        )
    return f"model.path={name!r}: {why}"


def read_model_folder(folder: Path, variant: str | None = None) -> ModelFolder:
    """Read model_index.json.

    Raises:
        PolicyError: not a folder in the diffusers pipeline layout, or a damaged index.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise PolicyError(
            f"{folder}: not a diffusers pipeline folder (model_index.json is not there); expected what "
            "`DiffusionPipeline.save_pretrained(folder)` writes"
        )
    return ModelFolder(folder, read_json(index_file), variant)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the model folder."""
    if not file.is_file():
        raise incomplete(file)
    try:
        content = bounded.read_json(file)
    except ValueError as error:
        raise PolicyError(f"{file}: not readable as JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{file}: holds {type(content).__name__}, expected a JSON object")
    return content


def component_folder(model: ModelFolder, component: str) -> Path:
    """The subfolder of a component that the family needs.

    Raises:
        MissingError: the index or the disk lacks it.
    """
    folder = model.path / component
    is_named = model.has(component)
    if not is_named or not folder.is_dir():
        where = f"{folder} does not exist" if is_named else "model_index.json does not name it"
        raise MissingError(
            f"{model.path}: component {component!r} is missing ({where}); a {model.pipeline_class} needs it, "
            "save the whole pipeline with `save_pretrained`"
        )
    return folder


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant that a component's weights are read from: as in diffusers the plain one, where a component
    has no file of the chosen variant and another component of the model has."""
    if variant is None or named_weights(folder, variant) or not named_weights(folder, None):
        return variant
    others = [other for other in folder.parent.iterdir() if other.is_dir()]
    return None if any(named_weights(other, variant) for other in others) else variant


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one component (shards included) of the chosen variant, or of the plain one
    (`variant_of`), each with a readable header.

    Raises:
        MissingError: there is none (a pickle file does not count: those can run code).
        PolicyError: one is truncated or damaged.
    """
    files = named_weights(folder, variant_of(folder, variant))
    if not files:
        kind = f"variant {variant!r}" if variant else "plain variant"
        raise MissingError(
            f"{folder}: no safetensors weights ({kind}); pickled `.bin` files are not read, convert the "
            "model with `save_pretrained` or choose another model.variant"
        )
    for file in files:
        if not file.is_file():
            raise PolicyError(f"{file}: not a regular file; copy or download it again")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise PolicyError(
                f"{file}: damaged safetensors file of {file.stat().st_size} bytes ({error}); copy or "
                "download it again"
            ) from error
    return files


def named_weights(folder: Path, variant: str | None) -> list[Path]:
    """Files of one component that have the name of weights of the variant, in order."""
    infix = rf"\.{re.escape(variant)}" if variant else ""
    name = re.compile(rf"(diffusion_pytorch_model|model){infix}(-\d+-of-\d+)?\.safetensors")
    return sorted(file for file in folder.glob("*.safetensors") if name.fullmatch(file.name))


def fingerprint_files(files: Sequence[Path], root: Path) -> str:
    """sha256 over names (relative to `root`) and contents of weight files, in sorted order."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def incomplete(file: Path) -> MissingError:
    """The error that names a file which is not there."""
    return MissingError(f"{file}: file is missing; the model folder is incomplete, copy or download it again")


def load_module(
    module_class: type[ModelMixin],
    model: ModelFolder,
    component: str,
    dtype: torch.dtype,
    device: torch.device,
) -> ModelMixin:
    """One network of the folder, of a diffusers or transformers class: frozen, in eval mode, every weight
    from the file.

    Raises:
        MissingError: component or weights are not there.
        PolicyError: damaged file, or weights that do not fit the configuration.
    """
    folder = component_folder(model, component)
    weight_files(folder, model.variant)
    config = read_json(folder / "config.json")
    _check_size(folder, config)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
        raise PolicyError(
            f"{folder}: its weights are quantised ({method}), which cannot be trained or compared here; take "
            "the model's unquantised weights (model.dtype=bfloat16 and tuning.kind=lora save memory)"
        )
    try:
        module, report = module_class.from_pretrained(
            str(folder),
            dtype=dtype,
            variant=variant_of(folder, model.variant),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise PolicyError(
            f"{folder}: {module_class.__name__} cannot be loaded ({error}); config.json and weights must "
            "belong together"
        ) from error
    wrong = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    if wrong:
        raise PolicyError(
            f"{folder}: {len(wrong)} weights are missing or of another shape (first: {wrong[0]}); they would "
            "be random, so the model is refused"
        )
    return module.to(device).eval().requires_grad_(False)


def _check_size(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise a PolicyError for a number of layers that would take for ever to build."""
    for key, value in config.items():
        counts = value if isinstance(value, list) else [value]
        is_number = any(isinstance(count, int) and count > MOST_LAYERS for count in counts)
        if is_number and LAYERS.search(key):
            raise PolicyError(
                f"{folder / 'config.json'}: {key} is {value!r:.80}; expected at most {MOST_LAYERS}, copy or "
                "download the file again"
            )


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU; other names are torch devices.

    The device of an accelerator always has its number: threads, such as the one that scores, have a current
    device of their own, and `cuda` alone would be another one there.

    Raises:
        ConfigError: torch knows no such device, or does not find it here.
    """
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        return torch.empty(0, device=(best or "cpu") if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        there = f"cpu or {best.type}" if best else "cpu"
        raise ConfigError(f"model.device={name}: {reason}; expected auto, {there} on this machine") from error


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
