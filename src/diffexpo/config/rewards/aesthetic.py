"""LAION's aesthetic predictors: card of `rewards/aesthetic.py`."""

from typing import Literal

from diffexpo.config.rewards.card import VIT_L, VIT_L_PARAMETERS, NetworkCard


class AestheticCard(NetworkCard):
    """A head on the image vectors of a CLIPModel."""

    scorer = "AestheticReward"
    what = "LAION aesthetic v1 (linear) or v2 (MLP), by the file; reads no prompt"
    unit = "rating, about 1 to 10"
    path_is = "the head as .safetensors"
    base_is = "CLIPModel folder or hub id"
    default_base = VIT_L
    source = (
        "GitHub christophschuhmann/improved-aesthetic-predictor (v2), LAION-AI/aesthetic-predictor (v1), "
        "converted once (docs/rewards/aesthetic.md)"
    )
    licence = "v2 Apache-2.0, v1 MIT"
    pickled_entry = ""
    parameters = VIT_L_PARAMETERS
    score_range = (0.0, 11.0)
    papers = ("schuhmann2022laion", "radford2021clip")
    biases = "does not read the prompt; likes paintings more than photographs"

    type: Literal["aesthetic"] = "aesthetic"
