"""Scorers of images: higher is better. `REWARDS` is the list of types that a configuration may name."""

from __future__ import annotations

from diffexpo.rewards.aesthetic import AestheticReward
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.hps import HpsReward
from diffexpo.rewards.imagereward import ImageRewardScorer
from diffexpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from diffexpo.rewards.ocr import OcrReward
from diffexpo.rewards.python_file import PythonFileReward
from diffexpo.rewards.quality import BrisqueReward, OpenNsfwReward
from diffexpo.rewards.remote import RemoteReward
from diffexpo.rewards.self_judging import DenoisingReward, ImplicitReward
from diffexpo.rewards.vlm import VlmJudge

REWARDS = {
    "clip": ClipReward,
    "pickscore": ClipReward,
    "hpsv2": HpsReward,
    "hpsv2.1": HpsReward,
    "imagereward": ImageRewardScorer,
    "aesthetic": AestheticReward,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
    "python": PythonFileReward,
    "remote": RemoteReward,
    "vlm": VlmJudge,
    "ocr": OcrReward,
    "brisque": BrisqueReward,
    "open_nsfw": OpenNsfwReward,
    "implicit": ImplicitReward,
    "denoising": DenoisingReward,
}
