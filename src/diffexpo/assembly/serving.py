"""One scorer behind HTTP: from its settings to a server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffexpo.assembly.aliases import resolve
from diffexpo.bounded.yaml_texts import read_yaml
from diffexpo.config.load import load_config
from diffexpo.config.rewards import RewardCard
from diffexpo.errors import ConfigError
from diffexpo.policies.loading import choose_device
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.server import ScoreServer


def read_reward(file: Path | None, given: Mapping[str, str]) -> RewardCard:
    """Settings of one reward, from a file or from what is given; without a name it is called by its type.
    ConfigError for what is not YAML, not one reward, or has settings that are wrong."""
    values: object = dict(given)
    origin = "the command line" if file is None else str(file)
    if file is not None:
        values = read_yaml(file)
    if isinstance(values, list) and len(values) == 1:
        values = values[0]
    if not isinstance(values, dict):
        advice = "expected settings such as `type: clip` and `path: ...`"
        raise ConfigError(f"{origin} holds no single reward; {advice}")
    # Checked as the only reward of a run would be; whether it trains is the run's affair.
    only = {"name": values.get("type"), **values, "role": "train"}
    override = f"rewards={json.dumps([only])}"
    try:
        return load_config([], [override], {}).config.rewards[0]
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"--set {override}", origin)) from None


def open_server(config: RewardCard, *, device: str, **options: Any) -> ScoreServer:
    """The scorer of a configuration, loaded, behind a listening server with these options of `ScoreServer`;
    see `load_rewards` and `ScoreServer` for what they refuse."""
    chosen = choose_device(device) if device == "auto" else device
    (reward,) = load_rewards([config], resolve, chosen)
    return ScoreServer(reward, config.type, **options)
