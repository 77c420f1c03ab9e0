"""A batch's mean does not depend on how it is split."""

import dataclasses
import math

import pytest
import torch

from diffexpo.training.batches import micro_batches, split_batch
from diffexpo.types import PairBatch

from .tiny import TinyDpo, TinyLoader, TinyPolicy


def test_parts_hold_every_pair_and_every_contrast_pair_once() -> None:
    batch = TinyLoader(11, contrast=5).batch(0)
    parts = [split_batch(batch, start, min(start + 3, 11)) for start in range(0, 11, 3)]
    assert sum((part.keys for part in parts), ()) == batch.keys
    assert sum((part.contrast_keys for part in parts), ()) == batch.contrast_keys
    assert torch.equal(torch.cat([part.winner for part in parts]), batch.winner)
    assert torch.equal(
        torch.cat([part.explored for part in parts if part.explored is not None]), batch.explored
    )
    whole = split_batch(batch, 0, 11)
    assert whole.keys == batch.keys and whole.contrast_keys == batch.contrast_keys


def test_a_part_without_contrast_pairs_has_none_at_all() -> None:
    part = split_batch(TinyLoader(10, contrast=1).batch(0), 0, 3)
    assert (part.contrast_keys, part.explored, part.main, part.contrast_conditioning) == (
        (),
        None,
        None,
        None,
    )


@pytest.mark.parametrize("contrast", [0, 1, 3, 5, 10])
@pytest.mark.parametrize(("size", "world"), [(1, 1), (3, 1), (4, 2), (7, 3), (10, 1), (4, 12)])
def test_factors_give_the_whole_batch_gradient(contrast: int, size: int, world: int) -> None:
    batch = _in_double(TinyLoader(10, contrast).batch(0))
    whole = _gradient([(batch, 1.0)])
    parts = [part for rank in range(world) for part in micro_batches(batch, size, rank, world)]
    assert len([key for part, _ in parts for key in part.keys]) == 10
    torch.testing.assert_close(_gradient(parts), whole, rtol=1e-12, atol=1e-13)
    if contrast == 0:
        assert math.isclose(sum(factor for _, factor in parts), 1.0, rel_tol=1e-15)


def _in_double(batch: PairBatch) -> PairBatch:
    """With weights that differ, so that a factor on the wrong pair shows."""
    conditioning, contrast = batch.conditioning, batch.contrast_conditioning
    return dataclasses.replace(
        batch,
        winner=batch.winner.double(),
        loser=batch.loser.double(),
        conditioning=conditioning.to("cpu", torch.float64),
        weight=torch.linspace(0.2, 2.0, len(batch), dtype=torch.float64),
        explored=None if batch.explored is None else batch.explored.double(),
        main=None if batch.main is None else batch.main.double(),
        contrast_conditioning=None if contrast is None else contrast.to("cpu", torch.float64),
    )


def _gradient(parts: list[tuple[PairBatch, float]]) -> torch.Tensor:
    policy = TinyPolicy()
    policy.module.double()
    policy.weights.copy("current", "reference")
    for part, factor in parts:
        (TinyDpo().loss(policy, part, ("key",)).loss * factor).backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.weights.trainable().values()])
