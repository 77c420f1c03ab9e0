"""Whether the paper recipes fit on the cards that their headers name, by the estimate; exit code 1 if one
does not.

    .venv/bin/python benchmarks/recipe_cards.py

Networks are measured on the meta device: no weights, no accelerator; a few minutes of one core.
"""

from __future__ import annotations

import re
import shlex
import sys

from diffexpo.config import find_recipe, list_recipes, load_config
from diffexpo.estimate.resources import estimate


def card_settings(name: str) -> dict[int, list[str] | None]:
    """What the header of a recipe says for one GPU.

    Args:
        name: As `find_recipe`.
    Returns:
        Memory of the card in GB -> settings to put with `--set`, none if the recipe fits as it is; None where
        it does not fit.
    """
    text = re.sub(r"\n#     +", " ", find_recipe(name).read_text(encoding="utf-8"))
    found: dict[int, list[str] | None] = {}
    for card, what in re.findall(r"^#   (\d+) GB: (.*)$", text, re.MULTILINE):
        settings = [word for word in shlex.split(what) if "=" in word]
        found[int(card)] = None if what.startswith("does not fit") else settings
    return found


def main() -> int:
    wrong = 0
    for recipe in list_recipes():
        for card, settings in card_settings(recipe.name).items():
            found = estimate(load_config([recipe.name], settings or [], {}).config)
            is_right = found.fits(card) is (settings is not None)
            wrong += not is_right
            told = "fits" if settings is not None else "does not fit"
            verdict = "right" if is_right else "WRONG"
            print(f"{recipe.name}: {card} GB {told}, {found.total / 2**30:.1f} GiB: {verdict}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
