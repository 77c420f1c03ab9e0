"""ImageReward: card of `rewards/imagereward.py`."""

from typing import Literal

from diffexpo.config.rewards.card import NetworkCard


class ImageRewardCard(NetworkCard):
    """BLIP with a head, trained on human rankings."""

    scorer = "ImageRewardScorer"
    what = "ImageReward v1.0: human rankings, BLIP with a head"
    unit = "standardised reward, about -2 to 2"
    path_is = "ImageReward as .safetensors"
    base_is = "bert-base-uncased folder or hub id (tokenizer)"
    default_base = "google-bert/bert-base-uncased"
    source = (
        "hub repository THUDM/ImageReward, ImageReward.pt, 2 GB, converted once (docs/rewards/imagereward.md)"
    )
    licence = "Apache-2.0"
    pickled_entry = ""
    parameters = 447_000_000  # both towers, about
    score_range = (-4.0, 4.0)
    papers = ("xu2023imagereward",)
    biases = "rises with guidance alone; prompts are read up to 35 tokens"

    type: Literal["imagereward"] = "imagereward"
