"""Whether an image shows what a prompt of GenEval asks for: card of `rewards/geneval.py`."""

from typing import Literal

from diffexpo.config.rewards.card import VIT_L, NetworkCard

DETECTOR = "facebook/mask2former-swin-small-coco-instance"


class GenEvalCard(NetworkCard):
    """Entirely right or not, by a detector of COCO's 80 classes and CLIP for colours."""

    scorer = "GenEvalReward"
    what = "whether an image shows the things, counts, colours and places that a prompt of GenEval asks for"
    unit = "1 right, 0 wrong"
    path_is = "Mask2Former for COCO instances, folder or hub id"
    default_path = DETECTOR
    base_is = "CLIP ViT-L/14 folder or hub id, which tells colours"
    default_base = VIT_L
    source = f"hub repositories {DETECTOR} and {VIT_L}"
    licence = "Mask2Former: see the model card; openai/clip: MIT"
    papers = ("ghosh2023geneval",)
    biases = "knows 80 classes; misses small and hidden things; colours are CLIP's guess"
    parameters = None
    score_range = (0.0, 1.0)
    is_right_or_wrong = True
    why_unverified = "reads GenEval's prompts only, and the shipped images are single emoji"

    type: Literal["geneval"] = "geneval"
