"""Configuration to scorers, and the 8-bit picture that every scorer sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.schema import RewardConfig
from diffexpo.errors import ConfigError
from diffexpo.phases import phase
from diffexpo.types import Policy, Reward, Scorer


@phase("loading scorers")
def load_rewards(
    configs: Sequence[RewardConfig],
    resolve: Callable[[str], str],
    device: torch.device | str,
    open_denoiser: Callable[[RewardConfig], Policy] | None = None,
) -> list[Scorer]:
    """Build the scorers of a configuration, in its order.

    Args:
        configs: Reward settings; names must differ.
        resolve: Turns a `path` (an `emoji:` alias, say) into a folder, hub id or file.
        device: Where networks run.
        open_denoiser: Gives the model of a scorer that judges by denoising errors; None: there is no run to
            judge in.
    Returns:
        One scorer each, loaded and ready.
    Raises:
        ConfigError: two rewards of one name, a type without the path it needs, or one that judges latents
            where there are none.
        MissingError: model, file or function is not there.
        RewardError: a model that is not what the type needs.
    """
    from diffexpo.rewards import REWARDS

    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"rewards: name {name!r} is used {names.count(name)} times; names must be unique"
            )
    scorers: list[Scorer] = []
    for config in configs:
        if getattr(REWARDS[config.type], "needs_denoiser", False):
            if open_denoiser is None:
                raise ConfigError(
                    f"reward {config.name!r}: type {config.type} judges the latents that a run draws, and "
                    f"here are pictures only; "
                    "it can be neither served nor verified alone, use it in a run"
                )
            scorers.append(REWARDS[config.type](config.name, open_denoiser(config), config.self_judge))
            continue
        # A type with settings reads them itself; the others are built from their name.
        from_config = getattr(REWARDS[config.type], "from_config", None)
        scorer = from_config(config, resolve, device) if from_config else REWARDS[config.type](config.name)
        scorers.append(scorer if config.cache is None else _cached(scorer, config, device))
    return scorers


def _cached(scorer: Reward, config: RewardConfig, device: torch.device | str) -> Reward:
    """The scorer with its cache. One that names what its scores depend on is asked image by image; a network
    runs here, on this device."""
    from diffexpo.rewards.cache import CachedReward

    folder = Path(config.cache).expanduser()
    identity = getattr(scorer, "identity", None)
    if identity is not None:
        return CachedReward(scorer, folder, identity)
    kind = torch.device(device).type  # not which of several: alike, they give the same bits
    here = f"{kind} {torch.cuda.get_device_name(device)}" if kind == "cuda" else kind
    facts = {"type": config.type, "version": scorer.version, "scale": scorer.scale}
    return CachedReward(
        scorer,
        folder,
        facts | {"device": here, "threads": str(torch.get_num_threads()), "torch": torch.__version__},
        by_batch=True,
    )


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (B,3,H,W) in [0,1] to uint8 (B,H,W,3): round(255 x), clamped, as a saved PNG would hold them."""
    quantised = (images.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return quantised.permute(0, 2, 3, 1).contiguous().numpy()


def quantise(images: Tensor) -> Tensor:
    """Images (B,3,H,W) in [0,1] at 8 bits, float32 again. Quantising twice changes nothing."""
    return (images.detach().float() * 255).round().clamp(0, 255) / 255
