"""A scorer in another process: card of `rewards/remote.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffexpo.config.rewards.card import CalledCard


class RemoteCard(CalledCard):
    """Any scorer over HTTP."""

    scorer: ClassVar[str] = "RemoteReward"
    what: ClassVar[str] = "any scorer, on another machine or in another environment, over HTTP"
    unit: ClassVar[str] = "the served scorer's own"
    path_is: ClassVar[str] = "http://host:port of `diffexpo rewards serve`"
    source: ClassVar[str] = "the served scorer's own"
    licence: ClassVar[str] = "the served scorer's own"

    type: Literal["remote"] = "remote"
