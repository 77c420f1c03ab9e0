"""Whether a run has room on its accelerator, asked before anything is loaded or spent."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffexpo.config import RunConfig
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.estimate.memory import GIB
from diffexpo.estimate.resources import advise, estimate
from diffexpo.online.loop import Console
from diffexpo.policies.loading import choose_device


def free_bytes(device: torch.device) -> int | None:
    """Free memory of an accelerator; None where it is not a matter (the CPU) or not told."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0]


def check_room(
    config: RunConfig, console: Console, free: Callable[[torch.device], int | None] = free_bytes
) -> None:
    """Compare the estimate of a run with what its device has free, as `free` tells.

    Weights are counted exactly, so a run whose weights alone do not fit is refused. Activations are
    estimated, so one that seems to need more than there is goes on after a warning.

    Raises:
        ConfigError: not even the weights fit; the message has the settings that would make the run fit.
    """
    room = free(choose_device(config.model.device))
    if room is None:
        return
    try:
        found = estimate(config)
    except (MissingError, PolicyError):
        return  # the model is of a size that only loading it tells
    if found.fits(room / GIB):
        return
    advice = advise(config, cards=(room / GIB,))[0]
    settings = [f"--set {setting}" for change in advice.changes or () for setting in change.settings]
    smaller = f"{advice.total / GIB:.1f} GiB with {' '.join(settings)} (`diffexpo estimate` has the prices)"
    larger = "makes it fit; take a larger device or a smaller model (model.path)"
    weights = sum(item.bytes for item in found.memory if item.phase == "always")
    why = (
        f"about {found.total / GIB:.1f} GiB at once ({weights / GIB:.1f} GiB of it weights), and the "
        f"accelerator has {room / GIB:.1f} GiB free; "
        + (f"it would take {smaller}" if settings else f"nothing that this version knows {larger}")
    )
    if weights > room:
        raise ConfigError(f"no room for this run: {why}")
    console.warning(f"this run may not have room: {why}")
