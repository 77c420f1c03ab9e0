"""Cards to scorers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from diffexpo.config.rewards import RewardCard
from diffexpo.errors import ConfigError
from diffexpo.phases import phase
from diffexpo.rewards.cache import CachedReward
from diffexpo.types import Policy, Reward


@phase("loading scorers")
def load_rewards(
    configs: Sequence[RewardCard],
    resolve: Callable[[str], str],
    device: torch.device | str,
    open_denoiser: Callable[[RewardCard], Policy] | None = None,
) -> list[Reward]:
    """Build the scorers of a configuration, in its order, on a device.

    `resolve` turns a `path` (an `emoji:` alias, say) into a folder, hub id or file. `open_denoiser` gives the
    model of a scorer that judges by denoising errors; None outside of a run.

    Raises:
        ConfigError: two rewards have one name, or a type lacks its path or the latents that it judges.
        MissingError: model, file or function is missing.
        RewardError: a model is not what the type needs.
    """
    scorers: list[Reward] = []
    for name, count in Counter(config.name for config in configs).items():
        if count > 1:
            raise ConfigError(f"rewards: name {name!r} is used {count} times; names must be unique")
    for config in configs:
        scorer_type = scorer_class(type(config))
        if config.asks_people:
            raise ConfigError(
                f"reward {config.name!r}: type {config.type} {config.why_unverified}; it can be neither "
                "served nor verified alone"
            )
        if config.reads == "latents":
            if open_denoiser is None:
                raise ConfigError(
                    f"reward {config.name!r}: type {config.type} judges the latents that a run draws, and "
                    "here are images only; it can be neither served nor verified alone, use it in a run"
                )
            scorers.append(scorer_type(config.name, open_denoiser(config), config.self_judge))
            continue
        if config.path_is and config.chosen_path is None and config.pickled_entry is None:
            advice = f"expected {config.path_is}"
            raise ConfigError(f"rewards: {config.name!r} has type {config.type} but no path; {advice}")
        arguments = config.arguments(resolve, device)
        if config.stands_on:
            arguments["by"] = _named(scorers, config)
        scorer = scorer_type(config.name, **arguments)
        scorers.append(scorer if config.cache is None else _cached(scorer, config, device))
    return scorers


def _named(scorers: Sequence[Reward], config: RewardCard) -> Reward:
    """The scorer that another one stands on, of those that stand before it."""
    for scorer in scorers:
        if scorer.name == config.stands_on:
            return scorer
    raise ConfigError(
        f"reward {config.name!r} stands on {config.stands_on!r}, which does not come before it; it can be "
        "neither served nor verified alone, use it in a run"
    )


def scorer_class(card: type[RewardCard]) -> Any:
    """The class that scores: the one that a card names, in the file of this room with the card's name."""
    file = card.__module__.rpartition(".")[2]
    return getattr(import_module(f"diffexpo.rewards.{file}"), card.scorer)


def _cached(scorer: Reward, config: RewardCard, device: torch.device | str) -> Reward:
    """The scorer with its cache. One that names its `cache_facts`, what its scores depend on besides type,
    version and unit, is asked image by image; others are networks here."""
    folder = Path(str(config.cache)).expanduser()
    facts = {"type": config.type, "version": scorer.version, "scale": scorer.scale}
    own = getattr(scorer, "cache_facts", None)
    if own is not None:
        return CachedReward(scorer, folder, facts | own)
    kind = torch.device(device).type  # not which of several: those of one name give the same bits
    here = f"{kind} {torch.cuda.get_device_name(device)}" if kind == "cuda" else kind
    facts |= {"device": here, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    return CachedReward(scorer, folder, facts, by_batch=True)
