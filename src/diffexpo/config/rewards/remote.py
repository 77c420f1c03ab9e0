"""A scorer in another process: card of `rewards/remote.py`."""

from typing import Literal

from diffexpo.config.rewards.card import CalledCard


class RemoteCard(CalledCard):
    """Any scorer over HTTP."""

    scorer = "RemoteReward"
    what = "any scorer, on another machine or in another environment, over HTTP"
    unit = "the served scorer's own"
    path_is = "http://host:port of `diffexpo rewards serve`"
    source = "the served scorer's own"
    licence = "the served scorer's own"

    type: Literal["remote"] = "remote"
