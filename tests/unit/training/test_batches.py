"""A batch's mean does not depend on how it is split."""

import dataclasses
import math

import pytest
import torch

from diffexpo.training.batches import group_borders, micro_batches, move_batch, shape_borders, split_batch
from diffexpo.types import (
    STAYS,
    Batch,
    Conditioning,
    MixedRows,
    PairBatch,
    ScoredBatch,
    TrajectoryBatch,
    TrajectoryPairBatch,
)

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


def _filled(batch_type: type[Batch], rows: int = 7) -> Batch:
    """A batch whose every field has values that tell its rows apart."""
    values: dict[str, object] = {}
    for number, entry in enumerate(dataclasses.fields(batch_type)):
        if entry.name.endswith("keys"):
            values[entry.name] = tuple(f"{entry.name} {row}" for row in range(rows))
        elif entry.name.endswith("conditioning"):
            values[entry.name] = Conditioning(
                {"text": torch.arange(2.0 * rows).reshape(rows, 2) + 100 * number}
            )
        elif entry.name != "is_grouped":
            values[entry.name] = torch.arange(rows) + 100 * number
    return batch_type(**values)


BATCH_TYPES = [PairBatch, ScoredBatch, TrajectoryBatch, TrajectoryPairBatch]


@pytest.mark.parametrize("batch_type", BATCH_TYPES)
def test_every_field_of_every_batch_is_cut_with_its_rows(batch_type: type[Batch]) -> None:
    batch = _filled(batch_type)
    parts = [part for part, _ in micro_batches(batch, 3)]
    assert [len(part) for part in parts] == [3, 3, 1]
    for entry in dataclasses.fields(batch_type):
        whole, pieces = getattr(batch, entry.name), [getattr(part, entry.name) for part in parts]
        if isinstance(whole, tuple):
            assert sum(pieces, ()) == whole
        elif isinstance(whole, Conditioning):
            assert torch.equal(Conditioning.concatenate(pieces).tensors["text"], whole.tensors["text"])
        elif isinstance(whole, torch.Tensor):
            assert torch.equal(torch.cat(pieces), whole)
        else:
            assert pieces == [whole] * 3


@pytest.mark.parametrize("batch_type", BATCH_TYPES)
def test_every_tensor_of_every_batch_moves_but_what_stays(batch_type: type[Batch]) -> None:
    batch = _filled(batch_type)
    assert move_batch(batch, torch.device("cpu")) is batch
    moved = move_batch(batch, torch.device("meta"))
    for entry in dataclasses.fields(batch_type):
        value = getattr(moved, entry.name)
        tensors = value.tensors.values() if isinstance(value, Conditioning) else [value]
        place = "cpu" if STAYS in entry.metadata else "meta"
        assert all(t.device.type == place for t in tensors if isinstance(t, torch.Tensor))
    assert moved.keys == batch.keys


@pytest.mark.parametrize(("size", "world"), [(1, 1), (3, 1), (4, 2), (5, 2), (2, 3), (100, 1), (4, 12)])
def test_groups_that_belong_together_are_never_cut(size: int, world: int) -> None:
    batch = dataclasses.replace(
        _filled(ScoredBatch, 12),
        groups=torch.tensor([7, 7, 7, 2, 2, 9, 9, 9, 9, 9, 7, 7]),
        is_grouped=True,
    )
    assert group_borders(batch) == [0, 3, 5, 10, 12]
    parts = [part for rank in range(world) for part in micro_batches(batch, size, rank, world)]
    assert sum((part.keys for part, _ in parts), ()) == batch.keys
    assert math.isclose(sum(factor for _, factor in parts), 1.0, rel_tol=1e-15)
    ends = [int(key.split()[1]) for part, _ in parts for key in (part.keys[0],)]
    assert set(ends) <= {0, 3, 5, 10}
    assert all(len(part) <= max(size, 5) for part, _ in parts)


# ---- rows of several shapes ------------------------------------------------------------------------------------


def _mixed(*counts: int) -> MixedRows:
    """Rows 0, 1, 2, ... of one shape after the other."""
    parts, first = [], 0
    for width, count in enumerate(counts, start=1):
        parts.append(torch.arange(first, first + count)[:, None].expand(-1, width).clone())
        first += count
    return MixedRows(tuple(parts))


def test_a_slice_of_mixed_rows_is_a_tensor_where_it_has_one_shape() -> None:
    rows = _mixed(3, 2, 4)
    assert len(rows) == 9 and rows.borders == [3, 5] and rows.device.type == "cpu"
    assert torch.equal(rows[1:3], torch.tensor([[1], [2]]))
    assert torch.equal(rows[5:9], rows.parts[2])
    assert len(rows[4:4]) == 0
    across = rows[2:6]
    assert isinstance(across, MixedRows) and across.borders == [1, 3]
    assert [part[:, 0].tolist() for part in across.parts] == [[2], [3, 4], [5]]


@pytest.mark.parametrize(("size", "world"), [(1, 1), (3, 1), (4, 2), (7, 3), (100, 1), (4, 12)])
@pytest.mark.parametrize("batch_type", BATCH_TYPES)
def test_micro_batches_have_one_shape_and_hold_every_row_once(
    batch_type: type[Batch], size: int, world: int
) -> None:
    rows = {entry.name for entry in dataclasses.fields(batch_type)} & {
        *("winner", "loser", "latents", "x_t", "x_next", "old_mean"),
        *("winner_x_t", "winner_x_next", "loser_x_t", "loser_x_next"),
    }
    contrast = {"explored": _mixed(1, 3, 3), "main": _mixed(1, 3, 3)} if batch_type is PairBatch else {}
    batch = dataclasses.replace(_filled(batch_type), **{name: _mixed(4, 1, 2) for name in rows}, **contrast)
    parts = [part for rank in range(world) for part in micro_batches(batch, size, rank, world)]
    assert sum((part.keys for part, _ in parts), ()) == batch.keys
    assert math.isclose(sum(factor for _, factor in parts), 1.0, rel_tol=1e-15)
    for part, _ in parts:
        assert len(part) <= size
        for name in rows:
            values = getattr(part, name)
            assert isinstance(values, torch.Tensor)
            assert values[:, 0].tolist() == [int(key.split()[-1]) for key in part.keys]
        for name in contrast:
            assert isinstance(getattr(part, name), torch.Tensor)
    if contrast:
        explored = [row for part, _ in parts for row in part.explored[:, 0].tolist()]
        assert explored == list(range(7))


def test_contrast_pairs_are_cut_at_their_own_borders() -> None:
    batch = dataclasses.replace(
        _filled(PairBatch, 10),
        winner=_mixed(6, 4),
        loser=_mixed(6, 4),
        contrast_keys=("a", "b", "c", "d"),
        explored=_mixed(1, 3),
        main=_mixed(1, 3),
    )
    assert shape_borders(batch) == [3, 6]
    parts = [part for part, _ in micro_batches(batch, 10)]
    assert [(len(part), len(part.contrast_keys)) for part in parts] == [(3, 1), (3, 1), (4, 2)]
    assert all(isinstance(part.explored, torch.Tensor) for part in parts)


@pytest.mark.parametrize(("size", "world"), [(1, 1), (3, 1), (4, 2), (7, 3), (10, 1), (4, 12)])
@pytest.mark.parametrize("borders", [(10,), (4, 6), (1, 2, 7)])
@pytest.mark.parametrize("contrast", [0, 1, 4, 10])
def test_any_cut_of_a_mixed_batch_has_the_gradient_of_the_mean_over_all_its_rows(
    contrast: int, borders: tuple[int, ...], size: int, world: int
) -> None:
    """The tiny policy takes one width only, so that rows of several "shapes" are told apart by the parts they lie in."""
    batch = _in_double(TinyLoader(10, contrast).batch(0))
    mixed = dataclasses.replace(
        batch,
        winner=MixedRows(batch.winner.split(borders)),
        loser=MixedRows(batch.loser.split(borders)),
    )
    if contrast > 1:
        halves = {
            name: MixedRows(getattr(batch, name).split([1, contrast - 1])) for name in ("explored", "main")
        }
        mixed = dataclasses.replace(mixed, **halves)
    parts = [part for rank in range(world) for part in micro_batches(mixed, size, rank, world)]
    assert len(parts) >= len(borders)
    torch.testing.assert_close(_gradient(parts), _gradient([(batch, 1.0)]), rtol=1e-12, atol=1e-13)
