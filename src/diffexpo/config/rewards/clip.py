"""CLIP score, and the embedded judges: cards of `rewards/clip.py`."""

import re
from collections.abc import Iterator
from typing import Literal

from diffexpo.config.rewards.card import VIT_H_PARAMETERS, VIT_L, VIT_L_PARAMETERS, ClipLikeCard
from diffexpo.config.rewards.pickscore import PickScoreCard
from diffexpo.config.worlds import world_of

# Parameters of CLIPModels whose name tells their size.
PARAMETERS = (
    (r"pickscore|vit-h|vit_h", VIT_H_PARAMETERS),
    (r"vit-large|vit-l|vit_l", VIT_L_PARAMETERS),
    (r"vit-b", 151_277_313),
)
KNOWN_SCORES = {"emoji:judge_train": "judge_train.json", "emoji:judge_heldout": "judge_heldout.json"}


class ClipCard(ClipLikeCard):
    """Text-image agreement by any CLIPModel."""

    scorer = "ClipReward"
    what = "text-image agreement by any CLIPModel"
    unit = "cosine, 100 x cosine or cosine times the logit scale"
    path_is = "a folder, a hub id or emoji:judge_train"
    source = f"any CLIPModel repository, such as {VIT_L}"
    licence = "the model's own (openai/clip: MIT)"
    papers = ("radford2021clip",)
    biases = "hardly sees counts, relations and which thing has which colour; rises with guidance alone"
    is_sized_by_files = True

    type: Literal["clip"] = "clip"

    @property
    def num_parameters(self) -> int | None:
        """Of a model whose name tells its size."""
        path = (self.path or "").lower()
        return next((count for pattern, count in PARAMETERS if re.search(pattern, path)), None)

    @property
    def known_scores(self) -> str | None:
        """Those of the embedded judges."""
        is_usual = self.scale in (None, "logit") and self.precision == "float32"
        return KNOWN_SCORES.get(self.path or "") if is_usual else None

    def uses(self) -> Iterator[tuple[str, str | None]]:
        """CLIP, PickScore where that is the model, and weights that only their user can cite."""
        path = (self.path or "").lower()
        if "pickscore" in path:
            yield from (("", key) for key in PickScoreCard.papers)
        yield from super().uses()
        if not (world_of(path) or "pickscore" in path or "clip-vit" in path):
            yield f" (weights of {self.path})", None
