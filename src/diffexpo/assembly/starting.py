"""Where training starts if not at the base: the weights of another run, a model of the same shape, a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from diffexpo.assembly.aliases import resolve
from diffexpo.assembly.folders import result_path
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.contenders import read_contenders, start_contender
from diffexpo.config.iterates import split_iterate
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, DiffexpoError, MissingError
from diffexpo.policies.base import load_policy
from diffexpo.policies.family import FamilyPolicy
from diffexpo.policies.lora_files import find_lora, lora_rank, read_lora
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.training.distributed import World
from diffexpo.types import Policy

KEY = "tuning.start"


def put_start(config: RunConfig, run_dir: Path, policy: Policy, world: World) -> None:
    """Load p_0 of `tuning.start` (see `read_start`) into "current"; base and reference stay those of
    `model.path`, and a PolicyError refuses weights of other names or shapes.

    The run keeps its own copy, so what happens to the other folder afterwards does not matter to it. A
    contender is not trained yet: `contenders.start_from` follows.
    """
    if config.tuning.start is None or start_contender(config) is not None:
        return
    kept = run_dir / "checkpoints" / "weights-0000.safetensors"
    if world.rank == 0 and not kept.exists():
        policy.weights.load("current", read_start(config, policy))
        write_tensors(kept, policy.weights.state("current"))
    world.barrier()
    policy.weights.load("current", read_tensors(kept))


def read_start(config: RunConfig, policy: Policy) -> Mapping[str, Tensor]:
    """The weights that `tuning.start` names, by their names in the denoiser of the policy that is to have
    them; refused is what `check_start` refuses, and a LoRA file of another model."""
    folder, iteration = _start_folder(config)
    if (folder / "config.yaml").is_file():
        return weights_of_run(config, folder, iteration=iteration)
    check_start(config)
    if config.tuning.kind == "full":
        return whole_model(config, folder)
    file = find_lora(folder)
    assert file is not None and isinstance(policy, FamilyPolicy)  # `check_start` found it
    return read_lora(policy, file, KEY)


def check_start(config: RunConfig) -> None:
    """Refuse a `tuning.start` that training cannot start from, without reading weights.

    Raises:
        MissingError: no such folder, or its run is not finished, or has no such iterate.
        ConfigError: neither a run of this kind of tuning, nor a whole model for full fine-tuning, nor a LoRA
            file of at most the run's rank for LoRA. PolicyError: the file holds no LoRA.
    """
    if config.tuning.start is None or start_contender(config) is not None:
        return
    folder, iteration = _start_folder(config)
    if (folder / "config.yaml").is_file():
        file_of_run(config, folder, iteration=iteration)
    elif (folder / "model_index.json").is_file():
        if config.tuning.kind != "full":
            raise ConfigError(
                f"{KEY} = {folder} is a whole model, but tuning.kind=lora starts from adapters; expected the "
                "folder of a run with LoRA, or make that model the base: model.path"
            )
    elif not folder.exists():
        advice = "expected a finished run, RUN@2 for its second iterate, a model's folder, or a LoRA file"
        raise MissingError(f"{KEY} = {folder} does not exist; {advice}")
    elif (file := find_lora(folder)) is None:
        raise ConfigError(
            f"{KEY} = {folder} holds neither a run (config.yaml) nor a model (model_index.json) nor one LoRA "
            "file (.safetensors); expected one of them"
        )
    elif config.tuning.kind == "full":
        raise ConfigError(
            f"{KEY} = {file} is a LoRA, but tuning.kind=full starts from whole weights; expected "
            "tuning.kind=lora"
        )
    elif (rank := lora_rank(file)) > (own := config.tuning.lora.rank):
        raise ConfigError(f"{KEY} = {file}: its rank is {rank}, here {own}; set tuning.lora.rank={rank}")


def _start_folder(config: RunConfig) -> tuple[Path, int | None]:
    """The folder that `tuning.start` names, and the iteration, if it chooses one."""
    name, iteration = split_iterate(resolve(str(config.tuning.start)))
    return Path(name).expanduser(), iteration


def weights_of_run(
    config: RunConfig, folder: Path, key: str = KEY, iteration: int | None = None
) -> Mapping[str, Tensor]:
    """The result of a finished run, or one of its iterates, which the setting `key` names."""
    return read_tensors(file_of_run(config, folder, key, iteration))


def file_of_run(config: RunConfig, folder: Path, key: str = KEY, iteration: int | None = None) -> Path:
    """The file of `weights_of_run`; a ConfigError refuses a run with other tuning."""
    other = read_resolved(folder / "config.yaml").config
    mine, theirs = config.tuning, other.tuning
    if theirs.kind != mine.kind:
        raise ConfigError(
            f"{key} = {folder}: that run has tuning.kind = {theirs.kind}, this one {mine.kind}; expected the "
            "same kind"
            + ("" if theirs.kind == "lora" else f", or tuning.kind=full, or model.path={folder}/export")
        )
    if mine.kind == "lora" and theirs.lora.rank != mine.lora.rank:
        raise ConfigError(
            f"{key} = {folder}: its adapters have tuning.lora.rank = {theirs.lora.rank}, here "
            f"{mine.lora.rank}; expected the same rank"
        )
    if mine.kind == "lora" and _scale(theirs) != _scale(mine):
        raise ConfigError(
            f"{key} = {folder}: its adapters are multiplied by alpha / rank = {_scale(theirs):g}, here by "
            f"{_scale(mine):g}, so the same factors would be another model; set tuning.lora.alpha to match"
        )
    return result_path(folder, other, key, iteration)


def guidance_of_start(config: RunConfig) -> float:
    """Guidance that the model of `tuning.start` has learned, or the one that it started from; 1: none, or not
    known, as of a model that is not in a run's folder."""
    if config.tuning.start is None:
        return 1.0
    for contender in read_contenders(config):
        if contender.name == start_contender(config):
            return contender.config.algorithm.learned_guidance
    try:
        other = read_resolved(_start_folder(config)[0] / "config.yaml").config
    except DiffexpoError:  # a resumed run does not need that folder
        return 1.0
    return max(other.algorithm.learned_guidance, guidance_of_start(other))


def _scale(tuning: TuningConfig) -> float:
    rank, alpha = tuning.lora.rank, tuning.lora.alpha
    return 1.0 if alpha is None else alpha / rank


def elsewhere(model: ModelConfig, path: str) -> ModelConfig:
    """Another model on the same device; revision and variant belong to the run's own."""
    return model.model_copy(update={"path": path, "revision": None, "variant": None})


def whole_model(config: RunConfig, folder: Path) -> Mapping[str, Tensor]:
    """The denoiser of a diffusers folder."""
    model, tuning = elsewhere(config.model, str(folder)), TuningConfig(kind="full")
    return load_policy(model, tuning, folder_or_id=str(folder), seed=0).weights.state("base")
