"""The models behind rewards that judge latents: a run or export trained on pairs, or a base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffexpo.assembly.aliases import resolve, resolve_model
from diffexpo.assembly.folders import result_path
from diffexpo.assembly.starting import elsewhere, whole_model
from diffexpo.config import RunConfig, read_resolved
from diffexpo.config.iterates import split_iterate
from diffexpo.config.rewards.self_judging import SelfJudgeCard
from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, MissingError
from diffexpo.policies.base import load_policy
from diffexpo.training.checkpoint import read_tensors
from diffexpo.types import Policy

# As `policies.export` names it.
LORA_FILE = "pytorch_lora_weights.safetensors"
# The base alone is asked; an adapter of any rank leaves it as it is and takes less memory than a copy.
NO_TUNING = TuningConfig(kind="lora", lora=LoraConfig(rank=1))


def open_denoiser(config: RunConfig, own: Policy, reward: SelfJudgeCard) -> Policy:
    """The model that a self-judging reward of a run asks, apart from the run's `own`, so that it can score
    while the run draws: its "base" judges, or, of a trained judge, its "current" against its "base".

    Raises:
        MissingError: the folder is not there or was not trained.
        ConfigError: it holds no trained model, or one of other latents than the run's.
    """
    if reward.is_trained:
        judge = _trained(config, reward)
    else:
        path = reward.path or config.model.path
        model = config.model if path == config.model.path else elsewhere(config.model, path)
        judge = _load(model.model_copy(update={"dtype": reward.precision}), NO_TUNING)
    if tuple(judge.latent_shape) != tuple(own.latent_shape):
        raise ConfigError(
            f"reward {reward.name!r}: the judge's latents are {tuple(judge.latent_shape)}, those of "
            f"model.path = {config.model.path} are {tuple(own.latent_shape)}; expected a model of the same "
            "autoencoder"
        )
    return judge


def _trained(config: RunConfig, reward: SelfJudgeCard) -> Policy:
    """The trained model in "current" and what it started from in "base"."""
    name, iteration = split_iterate(resolve(str(reward.path)))
    folder = Path(name).expanduser()
    if (folder / "config.yaml").is_file():
        return _from_run(config, reward, folder, iteration)
    if (folder / LORA_FILE).is_file():
        return _from_lora(config, reward, folder / LORA_FILE)
    if (folder / "model_index.json").is_file():
        _refuse_half(reward)
        return _load(config.model, TuningConfig(kind="full"), whole_model(config, folder))
    if folder.exists():
        raise ConfigError(
            f"reward {reward.name!r}: path = {folder} holds no run (config.yaml) and no export "
            f"(model_index.json or {LORA_FILE}); expected the folder of a run that was trained on pairs, or "
            "its export"
        )
    advice = "train a judge first, e.g. `diffexpo run emoji/dpo_offline`"
    raise MissingError(f"reward {reward.name!r}: path = {folder} does not exist; {advice}")


def _from_run(config: RunConfig, reward: SelfJudgeCard, folder: Path, iteration: int | None) -> Policy:
    """The result of a finished run, or one of its iterates, against the run's own base."""
    trained = read_resolved(folder / "config.yaml").config
    if trained.tuning.kind == "full":
        _refuse_half(reward)
    weights = read_tensors(result_path(folder, trained, f"reward {reward.name!r}", iteration))
    model = trained.model.model_copy(update={"device": config.model.device, "dtype": reward.precision})
    # Both versions run for every score: they stay on the device, in full precision.
    tuning = trained.tuning.model_copy(update={"reference_dtype": "float32", "reference_device": "same"})
    return _load(model, tuning, weights)


def _from_lora(config: RunConfig, reward: SelfJudgeCard, file: Path) -> Policy:
    """An exported adapter on the run's base; its scale is inside the tensors."""
    try:
        # Names in the denoiser come without the component before them.
        tensors = {name.partition(".")[2]: tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: not readable as safetensors ({error}); export the run again") from error
    rank = next((len(tensor) for name, tensor in tensors.items() if ".lora_A." in name), None)
    if rank is None:
        raise ConfigError(f"{file}: holds no tensor named *.lora_A.*; expected what `diffexpo export` writes")
    targets = tuple(sorted({name.split(".lora_")[0] for name in tensors}))
    tuning = TuningConfig(kind="lora", lora=LoraConfig(rank=rank, target_modules=targets))
    return _load(config.model.model_copy(update={"dtype": reward.precision}), tuning, tensors)


def _refuse_half(reward: SelfJudgeCard) -> None:
    if reward.precision != "float32":
        raise ConfigError(
            f"reward {reward.name!r}: precision = {reward.precision}, but its model was trained whole, in "
            "float32, and what training changed is smaller than half precision resolves; remove precision"
        )


def _load(model: ModelConfig, tuning: TuningConfig, trained: Mapping[str, Tensor] | None = None) -> Policy:
    judge = load_policy(model, tuning, folder_or_id=resolve_model(model.path), seed=0)
    if trained is not None:
        judge.weights.load("current", trained)
    return judge
