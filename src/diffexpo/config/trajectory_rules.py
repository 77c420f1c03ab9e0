"""What cannot be learned from sampled trajectories, each with its reason. Part of `rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffexpo.config.algorithms import (
    D3poConfig,
    DdpoConfig,
    DpokConfig,
    FlowGrpoConfig,
    PrdpConfig,
    SpoConfig,
    TrajectoryConfig,
)

if TYPE_CHECKING:
    from diffexpo.config.schema import RunConfig

FLOW_SDES_WITH_TIME = ("flow_grpo", "dance")
"""SDEs whose noise grows with the time step, which Flow-GRPO's own KL and GRPO-Guard divide by or leave
out."""


def learns_from_trajectories(config: RunConfig) -> bool:
    """Whether each iteration draws its own images first, and learns from how they were drawn."""
    return isinstance(config.algorithm, TrajectoryConfig)


def trajectory_problems(config: RunConfig) -> list[str]:
    """Every contradiction of a method on trajectories with the rest, one line each; none for other
    methods."""
    if not learns_from_trajectories(config):
        return []
    return [
        *_density(config),
        *_data(config),
        *_steps(config),
        *_rewards(config),
        *_flow(config),
        *_rounding(config),
    ]


def _rounding(config: RunConfig) -> list[str]:
    if not config.explore.merge_lora:
        return []
    problem = (
        f"explore.merge_lora = true with algorithm.type = {config.algorithm.type}: log-probabilities would "
        f"be recorded with merged "
        f"weights and replayed with adapters, which round differently, so the ratio of the two would not be "
        f"1 before the first "
        f"update; set explore.merge_lora=false"
    )
    return [problem]


def _density(config: RunConfig) -> list[str]:
    sampler, name = config.explore.sampler, config.algorithm.type
    if sampler.name == "ddim" and sampler.eta == 0:
        cause, advice = "explore.sampler.eta = 0", "set eta above 0, e.g. 1"
    elif sampler.name in ("dpmpp", "flow_euler"):
        cause = f"explore.sampler.name = {sampler.name}"
        advice = "use flow_sde" if sampler.name == "flow_euler" else "use ddpm, or ddim with eta above 0"
    elif sampler.name == "flow_sde" and sampler.noise_level == 0:
        cause, advice = "explore.sampler.noise_level = 0", "set it above 0, e.g. 0.7"
    else:
        return []
    problem = (
        f"{cause} with algorithm.type = {name}: the kernel has no density, each step is certain, so a "
        f"transition has no "
        f"log-probability to raise or lower; {advice}"
    )
    return [problem]


def _data(config: RunConfig) -> list[str]:
    name = config.algorithm.type
    problems = []
    if config.offline.source is not None:
        problems.append(
            f"offline.source = {config.offline.source!r} with algorithm.type = {name}: it learns from the "
            f"steps in which an "
            f"image was drawn, and offline images have none; set offline.source=null"
        )
    if config.pairing.min_margin > 0 and not isinstance(config.algorithm, D3poConfig):
        problems.append(
            f"pairing.min_margin = {config.pairing.min_margin:g} with algorithm.type = {name}: it makes no "
            f"pairs of images; "
            f"set it to 0"
        )
    return problems


def _steps(config: RunConfig) -> list[str]:
    algorithm, sampler = config.algorithm, config.explore.sampler
    problems = []
    if (
        isinstance(algorithm, DdpoConfig)
        and algorithm.estimator == "score_function"
        and config.training.steps > 1
    ):
        problems.append(
            f"algorithm.estimator = score_function with training.steps = {config.training.steps}: after the "
            f"first update the "
            f"images are no longer the policy's own and the estimate is biased; set training.steps=1 or "
            f"importance_sampling"
        )
    if isinstance(algorithm, PrdpConfig) and algorithm.timestep_fraction < 1:
        problems.append(
            f"algorithm.timestep_fraction = {algorithm.timestep_fraction:g} with algorithm.type = prdp: the "
            f"log-ratio of a "
            f"trajectory is the sum over all its steps; set it to 1"
        )
    # The last step of ddpm and ddim adds no noise: its candidates would be equal.
    branchable = sampler.steps - (sampler.name in ("ddpm", "ddim"))
    if isinstance(algorithm, SpoConfig) and algorithm.first_transition >= branchable:
        problems.append(
            f"algorithm.first_transition = {algorithm.first_transition} with explore.sampler.steps = "
            f"{sampler.steps}: no step "
            f"is branched (the first {branchable} can be); set it below {branchable}"
        )
    if isinstance(algorithm, SpoConfig) and algorithm.judge is not None and not algorithm.judge.strip():
        problems.append(
            "algorithm.judge is empty: name a step-aware judge (a folder, or emoji:step_judge), or null to "
            "let the rewards rank"
        )
    if isinstance(algorithm, FlowGrpoConfig) and algorithm.window is not None:
        if algorithm.window > sampler.steps:
            problems.append(
                f"algorithm.window = {algorithm.window} with explore.sampler.steps = {sampler.steps}: the "
                f"window holds more "
                f"steps than there are"
            )
        if sampler.random_steps is not None:
            problems.append(
                "algorithm.window with explore.sampler.random_steps: both say which steps are random; set "
                "one of them to null"
            )
    return problems


def _rewards(config: RunConfig) -> list[str]:
    algorithm, kind = config.algorithm, config.mixture.kind
    if sum(reward.role == "train" for reward in config.rewards) < 2:
        return []
    if kind == "global" and isinstance(algorithm, SpoConfig):
        problem = (
            f"mixture.kind = global with algorithm.type = {algorithm.type}: candidates are ranked while they "
            f"are drawn, so all prompts "
            f"are never at hand and the ranking would depend on the batch; use zscore or rank"
        )
        return [problem]
    if kind != "pareto" or isinstance(algorithm, D3poConfig):
        return []
    problem = (
        f"mixture.kind = pareto with algorithm.type = {algorithm.type}: an order without numbers gives no "
        f"reward to learn from; "
        f"use zscore or rank, or d3po, which compares two images"
    )
    return [problem]


def _flow(config: RunConfig) -> list[str]:
    """Settings that belong to the SDE of a flow model."""
    algorithm, sampler = config.algorithm, config.explore.sampler
    if not isinstance(algorithm, FlowGrpoConfig):
        return []
    has_time = sampler.name == "flow_sde" and sampler.sde in FLOW_SDES_WITH_TIME
    kernel = f"flow_sde, {sampler.sde}" if sampler.name == "flow_sde" else sampler.name
    problems = []
    if algorithm.kl == "flow_grpo" and algorithm.kl_weight > 0 and not has_time:
        problems.append(
            f"algorithm.kl = flow_grpo with the sampler {kernel}: it leaves out a factor of the time step "
            f"that only the kernels "
            f"flow_grpo and dance of flow_sde have; set algorithm.kl=exact"
        )
    if algorithm.ratio == "guard" and not has_time:
        problems.append(
            f"algorithm.ratio = guard with the sampler {kernel}: it divides by the time step, in proportion "
            f"to which only the "
            f"kernels flow_grpo and dance of flow_sde move; set algorithm.ratio=plain"
        )
    return problems


def trajectory_notes(config: RunConfig) -> list[str]:
    """What is allowed but worth knowing before spending time."""
    if not learns_from_trajectories(config):
        return []
    algorithm, training = config.algorithm, config.training
    notes = []
    if training.warmup_fraction * training.steps >= 2:
        notes.append(
            f"training.warmup_fraction = {training.warmup_fraction:g} warms up anew in each of "
            f"{config.explore.iterations} "
            f"iterations; with few steps an iteration 0 is usual"
        )
    if isinstance(algorithm, DdpoConfig) and algorithm.min_count > algorithm.buffer_size:
        notes.append(
            "algorithm.min_count exceeds buffer_size: every image is compared with the whole batch, not with "
            "its prompt's"
        )
    if isinstance(algorithm, SpoConfig) and algorithm.judge is not None:
        notes.append(
            f"algorithm.judge = {algorithm.judge} ranks the candidates: the rewards only score finished "
            f"images, for the metrics"
        )
    if isinstance(algorithm, DpokConfig) and not algorithm.has_value_baseline:
        notes.append(
            "algorithm.has_value_baseline = false: advantages are plain rewards; if they are all of one "
            "sign, every image is "
            "pushed the same way"
        )
    return notes
