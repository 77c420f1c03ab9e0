"""Rows and latents of a store by name; without torch, so that a child process can make them quickly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffexpo.data.rows import Pair, Sample
from diffexpo.rng import numpy_generator


def sample_row(sample_id: str, prompt: str = "a cat", agent: str = "main", **more: object) -> Sample:
    columns: dict[str, object] = {
        "prompt_id": f"id {prompt}",
        "prompt": prompt,
        "source": "online",
        "weights": f"weights of {agent}",
        "rewards": {"judge": 0.5},
    }
    return Sample(sample_id=sample_id, agent=agent, **columns | more)


def pair_row(pair_id: str, winner: str, loser: str, prompt: str = "a cat", **more: object) -> Pair:
    columns: dict[str, object] = {
        "prompt_id": f"id {prompt}",
        "prompt": prompt,
        "judge": "judge",
        "source": "online",
        "margin": 1.0,
    }
    return Pair(pair_id=pair_id, winner_id=winner, loser_id=loser, **columns | more)


def latents_of(ids: Sequence[str], shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, np.ndarray]:
    return {i: numpy_generator("latents", i).standard_normal(shape, dtype=np.float32) for i in ids}


def latent_list(ids: Sequence[str], shape: tuple[int, ...] = (3, 8, 8)) -> list[np.ndarray]:
    return list(latents_of(ids, shape).values())
