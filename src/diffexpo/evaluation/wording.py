"""What the report of a run may speak of: the method's name, its data and parts, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo.config.methods import DEFAULT_METHOD, METHOD_BY_NAME, MethodConfig
from diffexpo.evaluation.records import Json

BASELINE = "baseline"
EMBEDDED_OFFLINE = "emoji:offline"


@dataclass(frozen=True)
class Method:
    """A run's method as its report describes it: its card, and what this run does of it.

    `has_agents`: two agents draw.
    """

    card: MethodConfig
    story: str
    first_iterate: str
    has_agents: bool
    has_negatives: bool
    has_offline: bool
    has_rewards: bool
    collects: bool
    compares_offline: bool

    @property
    def name(self) -> str:
        """Its name as papers write it."""
        return self.card.title

    def label(self, version: str) -> str:
        """What an evaluated version is called: base, offline DPO, or the method with the iterate's number."""
        return {"base": "base", BASELINE: "offline DPO"}.get(
            version, version.replace("iteration-", f"{self.name} ")
        )


def describe_method(config: Json) -> Method:
    """The method of a run in words, from its settings as nested values; what is missing has its default:
    `describe_method({}).name` is "EXPO"."""
    explore, card = _group(config, "explore"), card_of(_group(config, "algorithm"))
    collects = card.draws_first or int(explore.get("iterations", 5)) > 1
    has_offline = _group(config, "offline").get("source", EMBEDDED_OFFLINE) is not None
    has_agents = collects and not card.draws_first and card.is_ranked and int(explore.get("agents", 2)) == 2
    negatives = _group(explore, "negatives")
    has_negatives = negatives.get("source", "") is not None and negatives.get("schedule", "linear") != "off"
    is_planned = bool(_group(config, "baseline").get("offline_dpo", False))
    return Method(
        card=card,
        story=card.story or _story(card, collects, has_agents),
        first_iterate=_first_iterate(card, collects, has_offline),
        has_agents=has_agents,
        has_negatives=collects and has_negatives,
        has_offline=has_offline,
        has_rewards=bool(config.get("rewards", True)),
        collects=collects,
        compares_offline=is_planned or (card.has_pairs and has_offline and collects),
    )


def card_of(algorithm: Json) -> MethodConfig:
    """The method of settings that may be partial, or those of an earlier version; nothing is checked."""
    kind = METHOD_BY_NAME.get(str(algorithm.get("type", DEFAULT_METHOD)), METHOD_BY_NAME[DEFAULT_METHOD])
    return kind.model_construct(**{name: algorithm[name] for name in kind.model_fields if name in algorithm})


def _group(config: Json, name: str) -> Json:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _story(card: MethodConfig, collects: bool, has_agents: bool) -> str:
    """One sentence on how it learns."""
    if not collects:
        return f"the model learns from given {'pairs' if card.has_pairs else 'images'}; nothing is drawn."
    drawn = "two agents draw images" if has_agents else "the model draws images"
    if card.has_pairs and card.draws_first:
        return f"{drawn}, rewards rank them, and the steps that led to the better of two become likelier."
    if card.draws_first:
        return f"{drawn}, rewards score them, and the steps that led to good ones become likelier."
    if card.has_pairs:
        return f"{drawn}, rewards rank them, the model learns from best and worst."
    return f"{drawn}, rewards score them, the model learns from images and scores."


def _first_iterate(card: MethodConfig, collects: bool, has_offline: bool) -> str:
    """One sentence on what the first iterate has learned from."""
    first, things = f"{card.title} 1", "pairs" if card.has_pairs else "images"
    if card.draws_first:
        return "Each iterate learns from images that the one before it drew."
    if not collects:
        return f"{first} is trained on the given {things}."
    if not card.is_ranked or not has_offline:
        return f"{first} has seen nothing yet but what the base has: collecting begins after it."
    return f"{first} is trained on the given offline {things} alone; collecting begins after it."
