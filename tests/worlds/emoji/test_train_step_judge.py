"""The losses and noise levels that trained the step judge are what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffexpo.rewards.step_judge import StepJudgeNetwork, noise_level
from worlds.emoji.train_step_judge import (
    _Levels,
    contrast_loss,
    make_shape,
    noise_paths,
    preference_loss,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1)


def numpy_contrast(vectors: np.ndarray, scale: np.ndarray, texts: np.ndarray, same: np.ndarray) -> float:
    """CLIP's loss, one row and one column at a time."""
    total = []
    for group in range(len(vectors)):
        logits = scale[group] * vectors[group] @ texts[group].T
        for table, left_out in ((logits, same[group]), (logits.T, same[group].T)):
            for row in range(len(table)):
                kept = [c for c in range(len(table)) if c == row or not left_out[row, c]]
                total.append(math.log(sum(math.exp(table[row, c]) for c in kept)) - table[row, row])
    return float(np.mean(total))


def test_contrast_loss_equals_a_loop_in_numpy() -> None:
    vectors, texts = unit(3, 6, 4), unit(3, 6, 4, seed=1)
    scale = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
    same = torch.eye(6, dtype=torch.bool).repeat(3, 1, 1)
    same[1, 2, 4] = same[1, 4, 2] = True
    expected = numpy_contrast(*(each.numpy() for each in (vectors, scale, texts, same)))
    assert float(contrast_loss(vectors, scale, texts, same)) == pytest.approx(expected, rel=1e-12)
    one = unit(1, 4).expand(3, 6, 4)
    assert float(contrast_loss(one, scale, one, same & False)) == pytest.approx(math.log(6), rel=1e-12)
    assert float(contrast_loss(vectors, 1000 * scale, vectors, same)) < 1e-6


def test_preference_loss_is_the_bradley_terry_cross_entropy() -> None:
    first, second, label = torch.tensor(
        [[2.0, -1.0, 0.3], [0.5, 1.0, 0.3], [1.0, 0.5, 0.0]], dtype=torch.float64
    )
    chance = [1 / (1 + math.exp(b - a)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    each = [p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in zip(label.tolist(), chance, strict=True)]
    assert float(preference_loss(first, second, label)) == pytest.approx(-np.mean(each), rel=1e-12)
    assert float(preference_loss(first, first, label)) == pytest.approx(math.log(2), rel=1e-12)
    torch.testing.assert_close(
        preference_loss(first, second, label), preference_loss(second, first, 1 - label)
    )


def test_levels_cover_both_paths_and_keep_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = _Levels().draw(400, generator)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(400))
    level = noise_level(alpha, sigma)
    for half, path in zip(level.chunk(2), noise_paths().values(), strict=True):
        # One time in each two-hundredth: the levels lie between those of the slices' ends.
        ends = noise_level(*path.alpha_sigma(torch.arange(201) / 200))
        assert bool(((half >= ends[:-1] - 1e-6) & (half <= ends[1:] + 1e-6)).all())
    assert float(level.min()) < 0.05 and float(level.max()) > 0.95


def test_the_network_learns_to_tell_noisy_templates() -> None:
    torch.manual_seed(0)
    templates = torch.randn(16, 8, 8, 8)
    texts = unit(16, 128).float()
    network = StepJudgeNetwork(make_shape((0.0,)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        alpha, sigma = _Levels().draw(4, torch.Generator().manual_seed(len(losses)))
        alpha, sigma = alpha.repeat_interleave(16), sigma.repeat_interleave(16)
        x = templates.repeat(4, 1, 1, 1) * alpha.view(-1, 1, 1, 1) + torch.randn(64, 8, 8, 8) * sigma.view(
            -1, 1, 1, 1
        )
        vectors, scale = network(x, noise_level(alpha, sigma))
        same = torch.eye(16, dtype=torch.bool).expand(4, -1, -1)
        loss = contrast_loss(vectors.unflatten(0, (4, 16)), scale[::16], texts.expand(4, -1, -1), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.4 and np.mean(losses[-5:]) < 1.6
