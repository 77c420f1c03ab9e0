"""Scorers of images: higher is better. `REWARDS` is the list of types that a configuration may name."""

from __future__ import annotations

from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from diffexpo.rewards.python_file import PythonFileReward

REWARDS = {
    "clip": ClipReward,
    "jpeg_compressibility": JpegCompressibility,
    "jpeg_incompressibility": JpegIncompressibility,
    "python": PythonFileReward,
}
