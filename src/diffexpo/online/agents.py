"""Agents: which version of the weights draws which images.

After iteration t has trained p_t:

    EXPO-II (two agents)   main = p_{t-1}, exploration = p_t; each draws B images for a prompt
    EXPO-I  (one agent)    exploration = p_t draws all 2B, so both variants compare 2B candidates

A version's name in the policy's weight sets is the agent's name; its fingerprint stands in every sample row.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo.config.schema import ExploreConfig, NegativeConfig
from diffexpo.types import WeightSets


@dataclass(frozen=True)
class Agent:
    """One drawer of images: `version` names the weights, `fingerprint` their exact values."""

    name: str
    version: str
    num_images: int
    uses_negatives: bool
    fingerprint: str


def make_agents(weights: WeightSets, explore: ExploreConfig) -> list[Agent]:
    """The agents of one collecting iteration, in the order in which they draw.

    Args:
        weights: Holds "main" (p_{t-1}) and "current" (p_t).
        explore: Number of agents, images and who gets negative prompts.
    Returns:
        [main, exploration] for two agents, [exploration] with twice the images for one.
    """
    negatives = explore.negatives
    on = _uses_negatives(negatives)
    images = explore.images_per_prompt
    if explore.agents == 1:
        return [Agent("exploration", "current", 2 * images, on, weights.fingerprint("current"))]
    main = Agent("main", "main", images, on and negatives.agents == "both", weights.fingerprint("main"))
    exploration = Agent("exploration", "current", images, on, weights.fingerprint("current"))
    return [main, exploration]


def one_agent(weights: WeightSets, explore: ExploreConfig) -> list[Agent]:
    """The agent of a method that learns from its own trajectories: p_{t-1}, the main agent of iteration t as
    everywhere."""
    on = _uses_negatives(explore.negatives)
    return [Agent("main", "current", explore.images_per_prompt, on, weights.fingerprint("current"))]


def _uses_negatives(negatives: NegativeConfig) -> bool:
    return negatives.source is not None and negatives.schedule != "off"
