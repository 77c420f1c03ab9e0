"""Balance over the images of a prompt: card of `rewards/balance.py`."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import Field

from diffexpo.config.rewards.card import RewardCard, Run
from diffexpo.config.rewards.groupwise import group_problems
from diffexpo.config.section import NotNegative, Positive

PLACES = ("prompt", "noun")
"""What texts of values may hold in braces: the prompt, and the prompt without its article."""


def wrong_places(text: str) -> list[str]:
    """Names in braces that stand for nothing: `wrong_places("a {woman}")` is ["woman"]."""
    return [name for name in re.findall(r"\{([^{}]*)\}", text) if name not in PLACES]


class BalanceCard(RewardCard):
    """An image is worth more the rarer what it shows is among the prompt's images."""

    scorer = "BalanceReward"
    what = "how much an image helps its prompt's images to show all values alike often (a group reward)"
    unit = "nats: -log of how much too often the prompt's images show what it shows, about -1 to 3"
    source = "another reward of the run, which reads what an image shows"
    papers = ("zhan_expo",)
    never_cached = "compares images of a prompt"
    why_unverified = "compares images of a prompt by another reward; it is used in a run"

    type: Literal["balance"] = "balance"
    by: str = ""
    """`balance`: name of an earlier reward of the run, which scores an image for a text, such as `clip`,
    `vlm` or `scene_score`; role `watch` is enough."""
    values: dict[str, str] = Field(default_factory=dict)
    """`balance`: what an image may show, each with a text that the other reward scores; `{prompt}` stands for
    the prompt, `{noun}` for the prompt without its article: `{woman: "a woman {noun}", man: "a man
    {noun}"}`."""
    target: dict[str, NotNegative] | None = None
    """`balance`: share of each value that is wanted; they sum to 1. Null: all alike."""
    temperature: Positive = 1.0
    """`balance`: scores of the texts are divided by this before they become probabilities; 0.05 suits scores
    that are probabilities themselves, 1 logits."""

    @property
    def is_groupwise(self) -> bool:
        """It compares the images of a prompt."""
        return True

    @property
    def stands_on(self) -> str:
        """The other reward."""
        return self.by

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """What it compares; the other reward is given beside it."""
        return {"values": self.values, "target": self.target, "temperature": self.temperature}

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        earlier = []
        for reward in run.rewards:
            if reward is self:
                break
            earlier.append(reward)
        found = next((reward for reward in earlier if reward.name == self.by), None)
        if where.startswith("rewards.") and found is None:
            names = ", ".join(reward.name for reward in earlier) or "none"
            yield f"by = {self.by!r}: expected the name of a reward that stands before this one ({names})"
        elif found is not None and (found.asks_people or found.is_groupwise or found.reads != "images"):
            yield f"by = {self.by!r}: type {found.type} scores no image for a text; name another reward"
        if len(self.values) < 2 or len(set(self.values.values())) < len(self.values):
            yield f"values = {self.values!r}: expected two values or more, with different texts"
        wrong = [name for text in self.values.values() for name in wrong_places(text)]
        if wrong:
            expected = " or ".join(f"{{{place}}}" for place in PLACES)
            yield f"values: {{{wrong[0]}}} stands for nothing; expected {expected}"
        if self.target is not None:
            if set(self.target) != set(self.values):
                yield f"target names {', '.join(self.target)}; expected the values {', '.join(self.values)}"
            elif not math.isclose(sum(self.target.values()), 1.0, abs_tol=1e-6):
                yield f"target sums to {sum(self.target.values()):g}; expected 1"
            elif min(self.target.values()) == 0:
                yield "target has a share of 0, which no image could come near; leave that value out"
        yield from group_problems(run, where, "type = balance", "leave it out")
