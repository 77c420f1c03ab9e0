"""What cannot be done with pictures of several sizes, each with its reason. Part of `rules`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffexpo.config.algorithms import DpokConfig, ImprovementDpoConfig, SpinConfig, SpoConfig
from diffexpo.config.trajectory_rules import learns_from_trajectories

if TYPE_CHECKING:
    from diffexpo.config.schema import RunConfig


def bucket_problems(config: RunConfig) -> list[str]:
    """Every contradiction of `model.buckets` and `explore.aspect` with the rest, one line each."""
    return [*_use(config), *_methods(config)]


def _use(config: RunConfig) -> list[str]:
    """Sizes that no picture would have, and choices between one size."""
    aspect, buckets = config.explore.aspect, config.model.buckets
    head, problems = f"explore.aspect = {aspect}", []
    if aspect != "first" and not buckets:
        problems.append(
            f"{head} with model.buckets = []: there is one size only; name others in model.buckets"
        )
    if aspect != "first" and config.explore.iterations == 1 and not learns_from_trajectories(config):
        problems.append(
            f"{head} with explore.iterations = 1: no image is drawn for training; set it to first"
        )
    if aspect == "offline" and config.offline.source is None:
        problems.append(
            f"{head} with offline.source = null: there are no offline winners whose sizes it could follow; "
            f"use uniform"
        )
    if aspect == "first" and buckets and config.offline.source is None:
        problems.append(
            "model.buckets with offline.source = null and explore.aspect = first: no picture would have "
            "another size than the "
            "first; set explore.aspect=uniform, or leave model.buckets empty"
        )
    return problems


def _methods(config: RunConfig) -> list[str]:
    """Methods that compare or look at images of one shape only."""
    algorithm = config.algorithm
    if not config.model.buckets:
        return []
    reasons = {
        SpinConfig: "its winners are data images and its losers the model's own, which would differ in shape within a pair",
        ImprovementDpoConfig: "distances between improved images and losers are measured over latents of one shape",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(algorithm, kind)), None)
    if isinstance(algorithm, SpoConfig) and algorithm.judge is not None:
        reason = "algorithm.judge was trained on latents of one shape; set algorithm.judge=null to let the rewards rank, or"
    if isinstance(algorithm, DpokConfig) and algorithm.has_value_baseline:
        reason = "the learned baseline reads latents of one shape; set algorithm.has_value_baseline=false, or"
    if reason is None:
        return []
    tail = (
        f"{reason} leave model.buckets empty"
        if reason.endswith("or")
        else f"{reason}; leave model.buckets empty"
    )
    return [f"model.buckets with algorithm.type = {algorithm.type}: {tail}"]
