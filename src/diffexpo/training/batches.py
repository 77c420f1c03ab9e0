"""How one global batch becomes shares of processes and micro-batches, without changing its mean."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffexpo.types import PairBatch


def split_batch(batch: PairBatch, start: int, stop: int) -> PairBatch:
    """Pairs start..stop-1 of a batch, with the proportional slice of its contrast pairs. Views, no copies.

    Of E contrast pairs beside B pairs the part gets those from floor(start E / B) to floor(stop E / B), so
    that adjoining parts together hold every contrast pair once.

    Args:
        batch: B pairs.
        start: First pair, 0 <= start <= stop.
        stop: One past the last pair, <= B.
    Returns:
        stop - start pairs; without contrast pairs if the slice of them is empty. split_batch(b, 0, len(b))
        equals b.
    """
    assert 0 <= start <= stop <= len(batch)
    part = slice(start, stop)
    num_contrast = len(batch.contrast_keys)
    low, high = start * num_contrast // max(1, len(batch)), stop * num_contrast // max(1, len(batch))
    contrast = slice(low, high)
    has_contrast = high > low
    assert not has_contrast or (batch.explored is not None and batch.main is not None)
    return PairBatch(
        winner=batch.winner[part],
        loser=batch.loser[part],
        conditioning=batch.conditioning.select(part),
        keys=batch.keys[part],
        weight=_rows(batch.weight, part),
        uncertainty_winner=_rows(batch.uncertainty_winner, part),
        uncertainty_loser=_rows(batch.uncertainty_loser, part),
        explored=_rows(batch.explored, contrast) if has_contrast else None,
        main=_rows(batch.main, contrast) if has_contrast else None,
        contrast_conditioning=batch.contrast_conditioning.select(contrast)
        if has_contrast and batch.contrast_conditioning is not None
        else None,
        contrast_keys=batch.contrast_keys[contrast],
    )


def micro_batches(
    batch: PairBatch, size: int, rank: int = 0, world: int = 1
) -> list[tuple[PairBatch, float]]:
    """One process's micro-batches, each with the factor of its mean loss in the global mean loss.

    sum over all processes and micro-batches of factor * loss(micro-batch) = loss(batch), if loss is the mean
    of weight * (loss of a pair) plus the mean of a term over contrast pairs. Where a micro-batch's share of
    the contrast pairs is not its share of the pairs, the factor is the former and `weight` makes up for it.

    Args:
        batch: The global batch of B pairs.
        size: Most pairs in a micro-batch.
        rank: This process, 0 <= rank < world; it takes the contiguous pairs rank B / world .. (rank + 1) B /
            world - 1.
        world: Number of processes.
    Returns:
        (micro-batch, factor) in order; without contrast pairs the factors are pairs / B and sum to 1 over all
        processes.
    """
    total, num_contrast = len(batch), len(batch.contrast_keys)
    first, last = process_share(total, rank, world)
    parts = []
    for start in range(first, last, size):
        part = split_batch(batch, start, min(start + size, last))
        factor = len(part) / total
        share = len(part.contrast_keys)
        if share and share * total != len(part) * num_contrast:
            weight = torch.ones(len(part), device=part.winner.device) if part.weight is None else part.weight
            part = replace(part, weight=weight * (len(part) * num_contrast / (total * share)))
            factor = share / num_contrast
        parts.append((part, factor))
    return parts


def process_share(total: int, rank: int, world: int) -> tuple[int, int]:
    """Contiguous share of `total` items: (first, one past the last). process_share(5, 1, 2) is (2, 5)."""
    return rank * total // world, (rank + 1) * total // world


def move_batch(batch: PairBatch, device: torch.device) -> PairBatch:
    """The batch on a device; the same object if it is there already."""
    if batch.winner.device == device:
        return batch
    contrast = batch.contrast_conditioning
    return replace(
        batch,
        winner=batch.winner.to(device),
        loser=batch.loser.to(device),
        conditioning=batch.conditioning.to(device),
        weight=_moved(batch.weight, device),
        uncertainty_winner=_moved(batch.uncertainty_winner, device),
        uncertainty_loser=_moved(batch.uncertainty_loser, device),
        explored=_moved(batch.explored, device),
        main=_moved(batch.main, device),
        contrast_conditioning=None if contrast is None else contrast.to(device),
    )


def _rows(tensor: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[part]


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
