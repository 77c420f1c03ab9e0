"""How judges of looks are measured: shares of couples, and images that differ in their damage alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffexpo.worlds.scenes.grammar import scenes_of
from worlds.scenes.quality_looks import couples_right, damaged_pairs, share_right


def test_couples_are_counted_within_a_prompt() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    first = np.array([[True, False, False], [True, False, True]])
    # Of the first prompt 3 is above 1 and 2; of the second 0 and 4 are below 5.
    assert couples_right(scores, first, ~first) == (pytest.approx(0.5), 4)


def test_a_pair_shows_the_same_scenes_with_and_without_the_damage() -> None:
    scenes = scenes_of("heldout")[:6]
    clean, faded = damaged_pairs("fade", (0.0, 1.0), scenes, 0)
    assert clean.shape == faded.shape == (6, 3, 64, 64)
    # Washed out sprites have paler colours wherever they lie: a score of the strongest colour orders all right.
    colour = share_right(
        lambda images, texts: (images.amax(1) - images.amin(1)).amax((1, 2)), clean, faded, [""] * 6
    )
    assert colour == 1.0
    assert torch.equal(damaged_pairs("fade", (0.0, 1.0), scenes, 0)[1], faded)
