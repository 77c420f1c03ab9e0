"""A user's own scorer: `file.py:function`, called as function(images, prompts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffexpo.config.own_code import digest_of, load_function, split_function
from diffexpo.errors import RewardError
from diffexpo.rewards.calling import map_concurrently
from diffexpo.rewards.foreign import blame


class PythonFileReward:
    """Scores by a user's function.

    The function gets `images`, a float32 tensor (B,3,H,W) in [0,1] on the CPU, and `prompts`, a list of B
    strings, and returns B numbers (list, tuple, NumPy array or tensor), higher is better. NaN or infinity
    excludes that image and is counted.

    `concurrency` calls may be under way at once, each with its share of a batch; with more than one the
    function must be thread-safe and score each image by itself. Refused are a `path` that is not
    `file.py:function` (ConfigError), one that is not there (MissingError) and a file that cannot be run
    (RewardError).
    """

    scale = "the function's own"
    cache_facts: Mapping[str, str] = {}

    def __init__(self, name: str, path: str, *, concurrency: int = 1) -> None:
        self.name = name
        file, function_name = split_function(path, f"reward {name!r}")
        # One file may hold several scorers.
        self.version = f"{digest_of(file)} {function_name}"
        self._concurrency = concurrency
        self._where = f"reward {name!r}: {file}:{function_name}"
        with blame(f"reward {name!r}: importing {file}"):
            self._function = load_function(file, function_name, f"reward {name!r}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), NaN where the function gave no finite number; RewardError if it raised, or returned
        something other than B numbers."""
        images, texts = images.detach().float().cpu(), list(prompts)
        size = max(-(-len(texts) // self._concurrency), 1)
        parts = [(images[at : at + size], texts[at : at + size]) for at in range(0, max(len(texts), 1), size)]
        return torch.cat(map_concurrently(self._score_part, parts, self._concurrency))

    def _score_part(self, part: tuple[Tensor, list[str]]) -> Tensor:
        images, prompts = part
        with blame(self._where):
            result: Any = self._function(images, prompts)
        try:
            scores = torch.as_tensor(result, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            reason = f"{self._where} returned {type(result).__name__}, which is not numbers ({error})"
            is_couple = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
            advice = f"expected {len(images)} numbers" + ", without anything beside them" * is_couple
            raise RewardError(f"{reason}; {advice}") from error
        if scores.shape != (len(images),):
            reason = f"{self._where} returned shape {tuple(scores.shape)} for {len(images)} images"
            advice = "expected one number each"
            raise RewardError(f"{reason}; {advice}")
        return torch.where(torch.isfinite(scores), scores, torch.nan)
