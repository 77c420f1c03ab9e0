"""Whether the paper recipes fit on the cards that their headers name, by the estimate; exit code 1 if one
does not.

    .venv/bin/python benchmarks/recipe_cards.py

Networks are measured on the meta device: no weights, no accelerator; a few minutes of one core.
"""

from __future__ import annotations

import sys

from diffexpo.config import list_recipes, load_config
from diffexpo.config.recipes import card_settings
from diffexpo.estimate.resources import estimate


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
