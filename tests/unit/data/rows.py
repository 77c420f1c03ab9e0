"""Rows and latents by name; apart from conftest so that a child process can make them without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffexpo.rng import numpy_generator


def sample_row(
    sample_id: str, prompt: str = "a cat", agent: str = "main", **more: object
) -> dict[str, object]:
    row = {
        "sample_id": sample_id,
        "prompt_id": f"id {prompt}",
        "prompt": prompt,
        "agent": agent,
        "source": "online",
    }
    return row | {"weights": f"weights of {agent}", "rewards": {"judge": 0.5}} | more


def pair_row(
    pair_id: str, winner: str, loser: str, prompt: str = "a cat", **more: object
) -> dict[str, object]:
    row = {
        "pair_id": pair_id,
        "prompt_id": f"id {prompt}",
        "prompt": prompt,
        "winner_id": winner,
        "loser_id": loser,
    }
    return row | {"judge": "judge", "source": "online", "margin": 1.0} | more


def latents_of(ids: Sequence[str], shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, np.ndarray]:
    return {i: numpy_generator("latents", i).standard_normal(shape, dtype=np.float32) for i in ids}
