"""Combinations of settings that are wrong together, each refused with its reason; and notes on those that are
merely odd.

A setting that would silently do nothing (a bonus that is never evaluated, a smoothing that the loss ignores)
is refused too: its user expects an effect.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffexpo.config.algorithms import (
    DiffusionDpoConfig,
    ExpoConfig,
    ForwardConfig,
    ImprovementDpoConfig,
    MapoConfig,
    MarginConfig,
    SpinConfig,
)
from diffexpo.config.bucket_rules import bucket_problems
from diffexpo.config.image_rules import image_notes, image_problems
from diffexpo.config.trajectory_rules import (
    learns_from_trajectories,
    trajectory_notes,
    trajectory_problems,
)
from diffexpo.errors import ConfigError

if TYPE_CHECKING:
    from diffexpo.config.rewards import RewardCard
    from diffexpo.config.schema import RunConfig

LITERAL_SCALE = 1000.0
"""T of the papers: `beta_explore: literal` is beta / T."""
AUTOCAST_TYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""What each `training.mixed_precision` casts weights to."""
UNRANKED = (SpinConfig, ImprovementDpoConfig)
"""Methods whose pairs are made without rewards."""


def check_combinations(config: RunConfig) -> None:
    """Refuse settings that contradict each other.

    Args:
        config: A configuration whose single values are already valid.
    Returns:
        None; `check_combinations(RunConfig())` passes.
    Raises:
        ConfigError: every contradiction found, one line each: keys and values, the reason, what to do.
    """
    problems = [
        *_rewards(config),
        *_judges(config),
        *_data(config),
        *_negatives(config),
        *_times(config),
        *_loss(config),
        *_bonus(config),
        *_uncertainty(config),
        *_training(config),
        *_copies(config),
        *_evaluation(config),
        *trajectory_problems(config),
        *image_problems(config),
        *bucket_problems(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def train_rewards(config: RunConfig) -> list[RewardCard]:
    """The rewards that rank images."""
    return [reward for reward in config.rewards if reward.role == "train"]


def effective_beta_explore(config: RunConfig) -> float:
    """beta inside the bonus of EXPO as a number: beta, beta / 1000 ("literal") or the number given."""
    algorithm = config.algorithm
    assert isinstance(algorithm, ExpoConfig)
    if algorithm.beta_explore == "matched":
        return algorithm.beta
    if algorithm.beta_explore == "literal":
        return algorithm.beta / LITERAL_SCALE
    return float(algorithm.beta_explore)


def collects(config: RunConfig) -> bool:
    """Whether any images are drawn for training: from the second iteration on, or in each where trajectories
    are learned from."""
    return config.explore.iterations > 1 or learns_from_trajectories(config)


def negatives_are_on(config: RunConfig) -> bool:
    """Whether any prompt can get a negative prompt while collecting."""
    negatives = config.explore.negatives
    return (
        collects(config)
        and negatives.source is not None
        and negatives.schedule != "off"
        and negatives.initial > 0
    )


def _rewards(config: RunConfig) -> list[str]:
    problems = []
    for label, scorers in (("rewards", config.rewards), ("evaluation.judges", config.evaluation.judges)):
        for index, reward in enumerate(scorers):
            problems += reward.problems(config, f"{label}.{index}")
    names = [reward.name for reward in (*config.rewards, *config.evaluation.judges)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(
            f"{names.count(name)} rewards or judges are named {name!r}: metrics would mix; names are unique"
        )
    if learns_from_trajectories(config) and not train_rewards(config):
        problems.append(
            f"rewards holds no reward with role: train, but algorithm.type = {config.algorithm.type} learns "
            f"from rewards: add one"
        )
    elif collects(config) and not train_rewards(config) and not isinstance(config.algorithm, UNRANKED):
        problems.append(
            f"rewards holds no reward with role: train, but explore.iterations = {config.explore.iterations} "
            f"ranks new "
            f"images: add one, or set explore.iterations=1 to learn from offline pairs alone"
        )
    return problems


def _judges(config: RunConfig) -> list[str]:
    trained = {reward.identity: reward.name for reward in train_rewards(config)}
    return [
        f"evaluation.judges.{index} ({judge.name}) is the training reward {trained[judge.identity]!r}: a "
        f"judge that was "
        f"trained on cannot show over-optimisation; choose another judge"
        for index, judge in enumerate(config.evaluation.judges)
        if judge.identity in trained
    ]


def _data(config: RunConfig) -> list[str]:
    problems = []
    only_offline = not collects(config)
    if only_offline and config.offline.source is None:
        problems.append(
            "offline.source = null with explore.iterations = 1: there is nothing to learn from; "
            "name offline pairs or use two iterations or more"
        )
    if only_offline and config.offline.source is not None and config.hybrid.offline_weight == 0:
        problems.append(
            "hybrid.offline_weight = 0 with explore.iterations = 1: the only data, the offline pairs, has "
            "weight 0"
        )
    if config.baseline.offline_dpo and config.offline.source is None:
        problems.append(
            "baseline.offline_dpo = true with offline.source = null: the baseline has no pairs to train on"
        )
    if not config.prompts.source.strip():
        problems.append("prompts.source is empty: name a prompt file or emoji:train")
    if config.prompts.source == config.evaluation.prompts:
        problems.append(
            f"evaluation.prompts = prompts.source = {config.prompts.source!r}: evaluation needs prompts "
            f"never trained on"
        )
    return problems


def _negatives(config: RunConfig) -> list[str]:
    explore = config.explore
    problems = []
    if not negatives_are_on(config):
        return problems
    if explore.negatives.mode == "cfg" and explore.sampler.guidance <= 1:
        effect = "never evaluated" if explore.sampler.guidance == 1 else "followed instead of avoided"
        problems.append(
            f"explore.negatives.mode = cfg with explore.sampler.guidance = {explore.sampler.guidance:g}: the "
            f"negative branch is "
            f"{effect}; set guidance above 1, negatives.mode=append or negatives.schedule=off"
        )
    if explore.negatives.agents == "exploration" and explore.agents == 1:
        problems.append(
            "explore.negatives.agents = exploration with explore.agents = 1: there is no separate "
            "exploration agent; use both"
        )
    return problems


def _times(config: RunConfig) -> list[str]:
    if not isinstance(config.algorithm, ForwardConfig):
        return []
    low, high = config.algorithm.timestep_range
    if low < high:
        return []
    shown = f"algorithm.timestep_range = [{low:g}, {high:g}]"
    return [f"{shown} holds no time: expected two numbers, the first below the second, e.g. [0, 0.2]"]


def _loss(config: RunConfig) -> list[str]:
    algorithm = config.algorithm
    problems: list[str] = []
    if not isinstance(algorithm, DiffusionDpoConfig):
        return problems
    if algorithm.label_smoothing > 0 and algorithm.kind not in ("cdpo", "robust"):
        problems.append(
            f"algorithm.label_smoothing = {algorithm.label_smoothing:g} with kind: {algorithm.kind}: only "
            f"cdpo and robust assume "
            f"flipped labels; choose one of them or set it to 0"
        )
    if algorithm.simpo_gamma > 0 and algorithm.kind != "simpo":
        problems.append(
            f"algorithm.simpo_gamma = {algorithm.simpo_gamma:g} with kind: {algorithm.kind}: only simpo has "
            f"a target margin"
        )
    return problems


def _bonus(config: RunConfig) -> list[str]:
    algorithm, explore = config.algorithm, config.explore
    if not isinstance(algorithm, ExpoConfig) or algorithm.alpha == 0:
        return []
    head = f"algorithm.alpha = {algorithm.alpha:g}"
    problems = []
    if algorithm.kind == "simpo":
        problems.append(
            f"{head} with kind: simpo: the bonus measures errors against the reference, simpo has none; the "
            f"two terms would speak "
            f"of different rewards"
        )
    if explore.agents == 1:
        problems.append(
            f"{head} with explore.agents = 1: both agents are the same weights, so exploration and main "
            f"samples follow one "
            f"distribution and the bonus is noise; use agents 2 or alpha 0"
        )
    if explore.iterations == 1:
        problems.append(
            f"{head} with explore.iterations = 1: no sample is ever explored, the bonus never acts"
        )
    if algorithm.contrast_fraction == 0:
        problems.append(f"{head} with algorithm.contrast_fraction = 0: the bonus has no contrast pairs")
    return problems


def _uncertainty(config: RunConfig) -> list[str]:
    algorithm = config.algorithm
    if not isinstance(algorithm, DiffusionDpoConfig) or algorithm.uncertainty == "off":
        return []
    head = f"algorithm.uncertainty = {algorithm.uncertainty}"
    problems = []
    count = len(train_rewards(config))
    if count < 2:
        problems.append(
            f"{head} with {count} train reward{'s' * (count != 1)}: Gamma is the spread between scorers, one "
            f"scorer has none; "
            f"add a second train reward"
        )
    if algorithm.kind == "simpo":
        problems.append(
            f"{head} with kind: simpo: the offset belongs to the logit against a reference, simpo has none"
        )
    if algorithm.uncertainty_scale == 0:
        problems.append(
            f"{head} with algorithm.uncertainty_scale = 0: the offset is always 0; use uncertainty: off"
        )
    return problems


def _training(config: RunConfig) -> list[str]:
    training = config.training
    if training.batch_size % training.micro_batch_size:
        divisors = [size for size in range(1, training.batch_size + 1) if training.batch_size % size == 0]
        near = max(size for size in divisors if size <= training.micro_batch_size or size == 1)
        problem = (
            f"training.micro_batch_size = {training.micro_batch_size} does not divide training.batch_size = "
            f"{training.batch_size}; {near} does"
        )
        return [problem]
    return []


def _copies(config: RunConfig) -> list[str]:
    """Settings of full fine-tuning's frozen copies, and of merged adapters, where there are none."""
    tuning, problems = config.tuning, []
    dtype, autocast = tuning.reference_dtype, config.training.mixed_precision
    if tuning.kind == "lora":
        if dtype != "float32":
            problems.append(
                f"tuning.reference_dtype = {dtype} with tuning.kind = lora: the reference is the frozen base "
                f"without adapters, or "
                "an adapter on it; model.dtype is its precision"
            )
        if tuning.reference_device != "same":
            problems.append(
                f"tuning.reference_device = {tuning.reference_device} with tuning.kind = lora: there are no "
                f"copies of the denoiser "
                "that could lie elsewhere; remove it"
            )
        return problems
    if config.explore.merge_lora:
        problems.append(
            "explore.merge_lora = true with tuning.kind = full: there are no adapters to merge; set it to "
            "false"
        )
    if dtype != "float32" and AUTOCAST_TYPES.get(autocast) != dtype:
        needed = next(name for name, cast in AUTOCAST_TYPES.items() if cast == dtype)
        problems.append(
            f"tuning.reference_dtype = {dtype} with training.mixed_precision = {autocast}: the policy would "
            f"run in another "
            f"precision than its reference, so their errors would differ where their weights are equal, and "
            f"the loss would not start "
            f"at margin 0; set training.mixed_precision={needed} or tuning.reference_dtype=float32"
        )
    return problems


def _evaluation(config: RunConfig) -> list[str]:
    evaluation = config.evaluation
    if evaluation.vendi_prompts > 0 and evaluation.vendi_images < 2:
        return [
            (
                "evaluation.vendi_images = 1: the Vendi score of one image is always 1; use 2 or more, or "
                "vendi_prompts: 0"
            )
        ]
    return []


def check_flow(config: RunConfig, kind: str) -> None:
    """Refuse samplers that do not fit the model, which is known only once it is loaded.

    Args:
        config: The settings of the run.
        kind: "vp" (noise-predicting diffusion) or "flow" (rectified flow).
    Returns:
        None; `check_flow(config, "flow")` passes if every sampler in use is flow_euler or flow_sde.
    Raises:
        ConfigError: names the key, the value and the samplers that fit.
    """
    used = [("evaluation.sampler.name", config.evaluation.sampler.name)]
    if collects(config):
        used.insert(0, ("explore.sampler.name", config.explore.sampler.name))
    fitting = "flow_euler or flow_sde" if kind == "flow" else "ddpm, ddim or dpmpp"
    problems = [
        f"{key} = {name} does not fit {config.model.path}, a {kind} model: expected {fitting}"
        for key, name in used
        if name.startswith("flow") != (kind == "flow")
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _method_notes(config: RunConfig) -> list[str]:
    algorithm = config.algorithm
    notes: list[str] = []
    if not isinstance(algorithm, DiffusionDpoConfig):
        return notes
    if isinstance(algorithm, ExpoConfig) and algorithm.alpha > 0:
        strength = algorithm.alpha * effective_beta_explore(config) / algorithm.beta
        if strength > 1:
            notes.append(
                f"algorithm.alpha x beta_explore / beta = {strength:.3g} > 1: where the loser was explored, "
                f"the labelled "
                f"margin stalls at h = {-math.log(strength - 1):+.3g}"
            )
        if algorithm.beta_explore == "literal":
            notes.append(
                f"algorithm.beta_explore = literal: the bonus acts with alpha x beta_explore / beta = "
                f"{strength:.3g}, "
                f"nearly inert unless alpha is in the hundreds"
            )
        if algorithm.kind != "sigmoid":
            notes.append(
                f"algorithm.kind = {algorithm.kind}: alpha <= 1 protects labels only with kind sigmoid"
            )
    if algorithm.kind in ("cdpo", "robust") and algorithm.label_smoothing == 0:
        notes.append(f"algorithm.kind = {algorithm.kind} with label_smoothing 0 is the same loss as sigmoid")
    if algorithm.kind == "simpo" and algorithm.reference == "previous":
        notes.append("algorithm.reference = previous is not used: simpo has no reference")
    return notes


def config_notes(config: RunConfig) -> list[str]:
    """What is allowed but worth knowing before spending time, one sentence each."""
    training, explore = config.training, config.explore
    notes = [*_method_notes(config), *trajectory_notes(config), *image_notes(config)]
    is_rollout = learns_from_trajectories(config)
    if explore.iterations > 1 and config.offline.source is None and not is_rollout:
        who = " as both agents" if explore.agents == 2 else ""
        notes.append(f"iteration 1 has no offline pairs to train on: it explores with the base model{who}")
    if config.baseline.offline_dpo and explore.iterations == 1:
        notes.append(
            "baseline.offline_dpo with explore.iterations = 1 trains on the same pairs as the run itself"
        )
    is_constant = explore.iterations == 2 and explore.negatives.schedule == "linear" and not is_rollout
    if is_constant and negatives_are_on(config):
        notes.append(
            "explore.negatives.schedule = linear with 2 iterations: one round is collected, so tau is its "
            "initial value"
        )
    for where, sampler in (("explore", explore.sampler), ("evaluation", config.evaluation.sampler)):
        if sampler.eta > 0 and sampler.name != "ddim":
            notes.append(f"{where}.sampler.eta = {sampler.eta:g} is not used by the sampler {sampler.name}")
    if not config.evaluation.judges:
        notes.append(
            "evaluation.judges is empty: the report has no win rate under a judge that was never trained on"
        )
    on_margins = isinstance(config.algorithm, (MarginConfig, MapoConfig))
    if config.tuning.kind == "full" and on_margins and training.learning_rate >= 5e-5:
        notes.append(
            f"training.learning_rate = {training.learning_rate:g} with full tuning: preference losses "
            f"collapsed at 1e-4 in our "
            f"trials (both errors rise, accuracy near 1); 5e-6 held"
        )
    if config.evaluation.grid_prompts > config.evaluation.num_prompts:
        notes.append("evaluation.grid_prompts exceeds num_prompts: the picture shows all evaluated prompts")
    return notes
