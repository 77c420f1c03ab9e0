"""People's votes. They compare two images and score none, so nothing here gives a number."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffexpo.errors import RewardError


class HumanVotes:
    """Stands for people where scorers are listed; their votes become pairs in the pair stage."""

    version = "people"
    scale = "votes"

    def __init__(self, name: str) -> None:
        self.name = name

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Always a RewardError: a vote is on two images."""
        raise RewardError(
            f"reward {self.name!r} asks people, who compare images and score none; use it in a run, whose "
            "pairs they make"
        )
