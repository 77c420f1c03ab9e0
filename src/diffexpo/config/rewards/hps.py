"""HPS v2.0 and v2.1: cards of `rewards/hps.py`."""

from collections.abc import Callable
from typing import Literal

from diffexpo.config.rewards.card import VIT_H, VIT_H_PARAMETERS, ClipLikeCard

_SOURCE = "hub repository xswu/HPSv2, {}, 2 GB, converted once (docs/rewards/hpsv2.md)"


class HpsCard(ClipLikeCard):
    """What both editions share: the network, its base, the unit."""

    scorer = "HpsReward"
    base_is = "CLIP ViT-H/14 folder or hub id (configuration and tokenizer)"
    default_base = VIT_H
    scales = ("percent", "raw", "logit")
    licence = "Apache-2.0"
    pickled_entry = "['state_dict']"
    parameters = VIT_H_PARAMETERS
    papers = ("wu2023hpsv2",)
    biases = "rises with guidance alone; prompts are read up to 77 tokens"

    def arguments(self, resolve: Callable[[str], str], device: object) -> dict[str, object]:
        """With the edition, which says whose weights are meant."""
        return super().arguments(resolve, device) | {"edition": self.type}


class Hpsv2Card(HpsCard):
    """HPS v2.0."""

    what = "HPS v2.0: human preferences of HPDv2"
    unit = "100 x cosine, about 20 to 30; not comparable with v2.1"
    path_is = "HPS_v2_compressed as .safetensors"
    source = _SOURCE.format("HPS_v2_compressed.pt")

    type: Literal["hpsv2"] = "hpsv2"


class Hpsv21Card(HpsCard):
    """HPS v2.1."""

    what = "HPS v2.1: human preferences, newer data"
    unit = "100 x cosine, about 20 to 35; not comparable with v2.0"
    path_is = "HPS_v2.1_compressed as .safetensors"
    source = _SOURCE.format("HPS_v2.1_compressed.pt")

    type: Literal["hpsv2.1"] = "hpsv2.1"
