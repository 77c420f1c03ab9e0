"""The cards of the model families. Imports without torch.

A family is a card here, the module of the same name in `diffexpo.policies`, and one line in `FAMILIES`.
"""

from __future__ import annotations

import re

from diffexpo.config.families import flux, pixart, sana, sd3, sdxl, unet
from diffexpo.config.families.card import Checkpoint, Family

__all__ = ["FAMILIES", "Checkpoint", "Family", "checkpoints", "family_of_name", "find_checkpoint"]

FAMILIES: dict[str, Family] = {
    module.CARD.pipeline: module.CARD for module in (unet, sdxl, sd3, flux, pixart, sana)
}
"""Pipeline class -> card. Names are looked for from the last card to the first: theirs are narrower."""


def checkpoints() -> dict[str, tuple[Family, Checkpoint]]:
    """Every published model whose sizes are known, by its name."""
    return {
        known.name: (family, known) for family in reversed(FAMILIES.values()) for known in family.checkpoints
    }


def find_checkpoint(name: str) -> tuple[Family, Checkpoint] | None:
    """The published model that a hub id, a folder's name or the name of a checkpoint tells.

    Args:
        name: For example `stabilityai/stable-diffusion-xl-base-1.0`, or `sdxl`.
    Returns:
        Family and checkpoint, or None; of `runwayml/stable-diffusion-v1-5` the checkpoint is "sd15".
    """
    wanted, known = name.lower(), checkpoints()
    found = (couple for couple in known.values() if re.search(couple[1].pattern, wanted))
    return known[wanted] if wanted in known else next(found, None)


def family_of_name(path: str) -> Family | None:
    """The family that a model's name tells, of a published size or not."""
    wanted = path.lower()
    return next((card for card in reversed(FAMILIES.values()) if re.search(card.pattern, wanted)), None)
