"""What the report of a run may speak of: the method's name, what it learns from and which parts it has, from
the settings alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffexpo.config.algorithms import (
    DEFAULT_METHOD,
    METHOD_BY_NAME,
    D3poConfig,
    MapoConfig,
    MarginConfig,
    TrajectoryConfig,
)
from diffexpo.config.names import method_name
from diffexpo.evaluation.records import Json

BASELINE = "baseline"
EMBEDDED_OFFLINE = "emoji:offline"
# Methods whose winners are not the best of what was drawn, so that nothing is ranked.
UNRANKED = ("spin", "improvement_dpo")
# Losses on a logit that is 0 where policy and reference agree.
LOGISTIC_KINDS = ("sigmoid", "cdpo", "robust")
LOGISTIC = ("spin", "dgpo", "d3po", "spo", "improvement_dpo")
# The setting that holds a model closer to where it began.
RESTRAINTS = {
    "expo": "raise algorithm.beta",
    "diffusion_dpo": "raise algorithm.beta",
    "improvement_dpo": "raise algorithm.beta",
    "spin": "raise algorithm.beta",
    "diffusion_kto": "raise algorithm.beta",
    "dgpo": "raise algorithm.beta",
    "d3po": "raise algorithm.beta",
    "spo": "raise algorithm.beta",
    "prdp": "raise algorithm.beta",
    "diffusion_nft": "raise algorithm.kl_weight",
    "awm": "raise algorithm.kl_weight",
    "dpok": "raise algorithm.kl_weight",
    "flow_grpo": "raise algorithm.kl_weight",
    "ddpo": "lower algorithm.clip_range",
}


@dataclass(frozen=True)
class Method:
    """A run's method as its report describes it.

    `has_pairs`: it learns from pairs of images. `has_agents`: two agents draw. `is_ranked`: rewards order
    what was drawn. `start_loss`: the loss where policy and reference agree, None if that is no fixed number.
    """

    type: str
    name: str
    story: str
    first_iterate: str
    has_pairs: bool
    has_agents: bool
    has_negatives: bool
    has_offline: bool
    has_rewards: bool
    is_ranked: bool
    is_rollout: bool
    collects: bool
    compares_offline: bool
    start_loss: float | None
    restraint: str

    def label(self, version: str) -> str:
        """What an evaluated version is called: base, offline DPO, or the method with the iterate's number."""
        return {"base": "base", BASELINE: "offline DPO"}.get(
            version, version.replace("iteration-", f"{self.name} ")
        )


def describe_method(config: Json) -> Method:
    """The method of a run in words.

    Args:
        config: Settings of the run as nested values; what is missing has its default.
    Returns:
        A Method; `describe_method({}).name` is "EXPO".
    """
    algorithm, explore = _group(config, "algorithm"), _group(config, "explore")
    kind = str(algorithm.get("type", DEFAULT_METHOD))
    settings = METHOD_BY_NAME.get(kind, METHOD_BY_NAME[DEFAULT_METHOD])
    is_rollout = issubclass(settings, TrajectoryConfig)
    collects = is_rollout or int(explore.get("iterations", 5)) > 1
    has_pairs = issubclass(settings, (MarginConfig, MapoConfig, D3poConfig))
    has_offline = _group(config, "offline").get("source", EMBEDDED_OFFLINE) is not None
    has_agents = collects and not is_rollout and kind not in UNRANKED and int(explore.get("agents", 2)) == 2
    is_planned = bool(_group(config, "baseline").get("offline_dpo", False))
    return Method(
        type=kind,
        name=method_name(kind),
        story=_story(kind, collects, is_rollout, has_pairs, has_agents),
        first_iterate=_first_iterate(kind, collects, is_rollout, has_pairs, has_offline),
        has_pairs=has_pairs,
        has_agents=has_agents,
        has_negatives=collects and _has_negatives(explore),
        has_offline=has_offline,
        has_rewards=bool(config.get("rewards", True)),
        is_ranked=kind not in UNRANKED,
        is_rollout=is_rollout,
        collects=collects,
        compares_offline=is_planned or (has_pairs and has_offline and collects),
        start_loss=_start_loss(kind, algorithm),
        restraint=RESTRAINTS.get(kind, "lower training.learning_rate"),
    )


def _group(config: Json, name: str) -> Json:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _has_negatives(explore: Json) -> bool:
    negatives = _group(explore, "negatives")
    return negatives.get("source", "") is not None and negatives.get("schedule", "linear") != "off"


def _story(kind: str, collects: bool, is_rollout: bool, has_pairs: bool, has_agents: bool) -> str:
    """One sentence on how it learns."""
    if kind == "spin":
        return "images of the data set win against those that the model draws for the same prompts."
    if kind == "improvement_dpo":
        return "an improvement model redraws the model's own images, and the improved image wins."
    if kind == "spo":
        return "candidates of single denoising steps are ranked, and the better ones become likelier."
    if not collects:
        return f"the model learns from given {'pairs' if has_pairs else 'images'}; nothing is drawn."
    drawn = "two agents draw images" if has_agents else "the model draws images"
    if has_pairs and is_rollout:
        return f"{drawn}, rewards rank them, and the steps that led to the better of two become likelier."
    if is_rollout:
        return f"{drawn}, rewards score them, and the steps that led to good ones become likelier."
    if has_pairs:
        return f"{drawn}, rewards rank them, the model learns from best and worst."
    return f"{drawn}, rewards score them, the model learns from images and scores."


def _first_iterate(kind: str, collects: bool, is_rollout: bool, has_pairs: bool, has_offline: bool) -> str:
    """One sentence on what the first iterate has learned from."""
    first, things = f"{method_name(kind)} 1", "pairs" if has_pairs else "images"
    if is_rollout:
        return "Each iterate learns from images that the one before it drew."
    if not collects:
        return f"{first} is trained on the given {things}."
    if kind in UNRANKED or not has_offline:
        return f"{first} has seen nothing yet but what the base has: collecting begins after it."
    return f"{first} is trained on the given offline {things} alone; collecting begins after it."


def _start_loss(kind: str, algorithm: Json) -> float | None:
    """ln 2 for a logistic loss whose logit starts at 0 (the exploration bonus joins in iteration 2 only)."""
    if kind in LOGISTIC:
        return math.log(2)
    is_logistic = str(algorithm.get("kind", "sigmoid")) in LOGISTIC_KINDS
    has_more = algorithm.get("sft_weight", 0.0) or algorithm.get("uncertainty", "off") != "off"
    return math.log(2) if kind in ("expo", "diffusion_dpo") and is_logistic and not has_more else None
