"""Agents: which version of the weights draws which images.

After iteration t has trained p_t:

    EXPO-II (two agents)   main = p_{t-1}, exploration = p_t; each draws B images for a prompt
    EXPO-I  (one agent)    exploration = p_t draws all 2B, so both variants compare 2B candidates

Where the card says so, the base alone draws, as the agent "base".

A version's name in the policy's weight sets is the agent's name; its fingerprint stands in every sample row.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffexpo.config.schema import ExploreConfig
from diffexpo.types import WeightSets


@dataclass(frozen=True)
class Agent:
    """One drawer of images: `version` names the weights, `fingerprint` their exact values."""

    name: str
    version: str
    num_images: int
    uses_negatives: bool
    fingerprint: str


def make_agents(
    weights: WeightSets, explore: ExploreConfig, *, draws_first: bool = False, drawn_by: str = "iterates"
) -> list[Agent]:
    """The agents of one collecting iteration, in the order in which they draw.

    `weights` holds "main" (p_{t-1}) and "current" (p_t). A method that `draws_first` what it learns from has
    p_{t-1} in "current", the main agent of iteration t as everywhere, and no other. `drawn_by` is the card's.
    """
    images, negatives = explore.images_per_prompt, explore.negatives
    is_on = negatives.source is not None and negatives.schedule != "off"

    def agent(name: str, version: str, count: int, uses_negatives: bool) -> Agent:
        return Agent(name, version, count, uses_negatives, weights.fingerprint(version))

    if draws_first:
        return [agent("main", "current", images, is_on)]
    if drawn_by == "base":
        return [agent("base", "base", 2 * images, is_on)]
    if explore.agents == 1:
        return [agent("exploration", "current", 2 * images, is_on)]
    return [
        agent("main", "main", images, is_on and negatives.agents == "both"),
        agent("exploration", "current", images, is_on),
    ]
