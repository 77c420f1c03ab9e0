"""LoRA files of other tools as weights to start from: the layouts that diffusers reads (its own, peft's,
kohya's), brought to the names, rank and scale of a run's adapters.

The update of a module is `(alpha / rank) B A` with its own alpha and rank in every file. Here all modules
have one rank r and one scale s, so that

    A' = [A; A_0]        B' = [(alpha / rank / s) B, 0]        s B' A' = (alpha / rank) B A

where A_0 are the rows of a fresh adapter: the model is exactly that of the file, and the rows that it lacks
can still be trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.policies.export import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from diffexpo.policies.family import FamilyPolicy, class_of
from diffexpo.policies.loading import HUB_ID, LOAD_ERRORS, read_json
from diffexpo.policies.weights import LoraWeightSets

# The factor that takes in a module's input, as the layouts name it: its first side is the rank.
DOWN = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight", "_lora.down.weight")
PEFT_PREFIX = "base_model.model."
OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "oft_": "OFT",
}
_log = logging.getLogger("diffexpo")


def find_lora(path: Path) -> Path | None:
    """The LoRA file that a path names: itself, or that of a folder as diffusers and peft write them; None
    where there is none."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    files = [path / LORA_FILE, path / PEFT_FILE, *sorted(path.glob("*.safetensors"))]
    known = [file for file in files[:2] if file.is_file()]
    return known[0] if known else files[2] if len(files) == 3 else None


def require_lora(name: str) -> Path:
    """The file of a LoRA: a `.safetensors` file, a folder with one, or the id of such a hub repository.

    Raises:
        MissingError: there is none, or a folder holds several, none called as diffusers or peft call it.
    """
    path = Path(name).expanduser()
    if not path.exists() and HUB_ID.fullmatch(name):
        try:
            path = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError) as error:
            raise MissingError(
                f"LoRA {name!r}: no such file, and the hub did not give it ({error})"
            ) from error
    file = find_lora(path)
    if file is not None:
        return file
    if path.is_dir():
        names = ", ".join(sorted(file.name for file in path.glob("*.safetensors"))) or "none"
        raise MissingError(f"LoRA {name!r}: expected one .safetensors file, or name it; there are {names}")
    raise MissingError(f"LoRA {name!r}: expected a .safetensors file or a folder with one; there is none")


def lora_rank(file: Path) -> int:
    """The largest rank in a LoRA file, from its header.

    Raises:
        PolicyError: not a safetensors file, or one without LoRA factors.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            ranks = [tensors.get_slice(name).get_shape()[0] for name in names if name.endswith(DOWN)]
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{file}: no readable safetensors file ({error}); get it again") from error
    kind = next((kind for mark, kind in OTHERS.items() if any(mark in name for name in names)), None)
    if kind is not None or not ranks:
        first = (names or ["none"])[0]
        found = f"holds {kind} factors" if kind else f"holds no LoRA factors (first: {first})"
        raise PolicyError(f"{file}: {found}; expected a LoRA of the layout of diffusers, peft or kohya")
    return max(map(int, ranks))


def read_lora(policy: FamilyPolicy, file: Path, key: str) -> dict[str, Tensor]:
    """The weights of `current` that draw what a LoRA file draws.

    Args:
        policy: The base with adapters; a file of another rank is filled up, see above.
        file: A safetensors file. key: The setting that names it, for messages.
    Raises:
        ConfigError: a higher rank than the run's, or modules that the run does not adapt.
        PolicyError: the file cannot be read, or is that of another model.
    """
    weights = policy.weights
    assert isinstance(weights, LoraWeightSets)  # `check_start` has refused other tuning
    if (rank := lora_rank(file)) > weights.rank:
        advice = f"set tuning.lora.rank={rank}"
        raise ConfigError(f"{key} = {file}: its rank is {rank}, tuning.lora.rank is {weights.rank}; {advice}")
    tensors, alphas = _of_denoiser(policy, file)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor = name.replace(".default.", ".").rpartition(".lora_")
        factors.setdefault(module, {})[factor] = tensor.float()
    state, ours = weights.state("base"), weights.alpha / weights.rank
    adapted = {name.rpartition(".lora_")[0] for name in state}
    if strange := sorted(factors.keys() - adapted):
        endings = sorted({_ending(module) for module in strange})
        raise ConfigError(
            f"{key} = {file}: {len(strange)} of its modules have no adapter here (first: {strange[0]}); set "
            f"tuning.lora.target_modules to cover {', '.join(endings)}, or take the LoRA of this model"
        )
    for module, pair in factors.items():
        down, up = (f"{module}.lora_{side}.weight" for side in "AB")
        if pair.keys() != {"A.weight", "B.weight"}:
            raise PolicyError(f"{file}: {module} has {', '.join(sorted(pair))}; expected both factors")
        own, scale = len(pair["A.weight"]), alphas.get(module)
        relative = (1.0 if scale is None else scale / own) / ours
        try:
            state[down][:own] = pair["A.weight"].reshape(own, *state[down].shape[1:])
            state[up][:, :own] = relative * pair["B.weight"].reshape(
                len(state[up]), own, *state[up].shape[2:]
            )
        except RuntimeError as error:
            raise PolicyError(f"{file}: {module} has another shape here ({error})") from error
    return state


def _ending(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def _of_denoiser(policy: FamilyPolicy, file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A file's factors of the denoiser under peft's names, and alpha by module where the file says it."""
    pipeline, network = class_of(policy.folder.pipeline_class), policy.weights.network
    if not hasattr(pipeline, "lora_state_dict"):
        return _of_peft(file)
    prefix, options = policy.card.denoiser[0], {"unet_config": network.config}
    try:
        state, *facts = pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
            **(options if prefix == "unet" else {}),
        )
    except (*LOAD_ERRORS, IndexError, AttributeError) as error:
        raise PolicyError(f"{file}: diffusers cannot read it as a LoRA ({error})") from error
    own = _inside(state, prefix)
    if not own:
        raise PolicyError(f"{file}: holds nothing for {prefix}, only {next(iter(state), 'no tensor')!r} ...")
    if others := len(state) - len(own):
        left = "tensors of text encoders are left out; only the denoiser is trained"
        _log.warning("%s: %d %s", file, others, left)
    tensors: dict[str, Tensor] = _peft_names(own)
    alphas, metadata = (facts[0] or {}) if len(facts) > 1 else {}, facts[-1] or {}
    of_keys = {name.removesuffix(".alpha"): value for name, value in _inside(alphas, prefix).items()}
    found = {name.partition(".lora_")[0]: float(value) for name, value in _peft_names(of_keys).items()}
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    return tensors, {**_alphas(_inside(metadata, prefix), modules), **found}


def _inside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What belongs to one component, without its name."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _peft_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names of older layouts of diffusers as peft's."""
    renamed = convert_unet_state_dict_to_peft(
        {name.replace(".processor.", "."): value for name, value in values.items()}
    )
    return dict(renamed)


def _of_peft(file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same of peft's own layout, whose settings stand in a file beside it."""
    config = file.parent / PEFT_CONFIG
    if not config.is_file():
        raise MissingError(f"{config}: file is missing; it says what {file.name} is multiplied by")
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    return tensors, _alphas(read_json(config), modules)


def _alphas(settings: Mapping[str, Any], modules: set[str]) -> dict[str, float]:
    """Alpha by module, from an adapter's settings as peft writes them."""
    if "lora_alpha" not in settings:
        return {}
    pattern = settings.get("alpha_pattern") or {}
    special = {
        module: float(alpha)
        for ending, alpha in pattern.items()
        for module in modules
        if module == ending or module.endswith(f".{ending}")
    }
    return dict.fromkeys(modules, float(settings["lora_alpha"])) | special
