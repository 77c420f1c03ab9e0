import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from diffexpo.rng import (
    keyed_choice,
    keyed_order,
    keyed_seed,
    keyed_uniform,
    numpy_generator,
    torch_generator,
)


def test_seeds_never_change_between_versions():
    # Written down once: another value here means that every old run would draw other pictures.
    assert keyed_seed() == 8238016292129134938
    assert keyed_seed(0, "a") == 863007531386670507
    assert keyed_seed(7, 2, "collect", "exploration", "p1", 3, 0) == 3139924877816261076
    assert torch_generator(0, "a").initial_seed() == keyed_seed(0, "a")
    assert torch.randn(2, generator=torch_generator(0, "a")).tolist() == pytest.approx(
        [0.1161211, -0.4279281], abs=1e-6
    )
    assert numpy_generator(0, "a").integers(0, 10**6, size=3).tolist() == [458187, 47449, 235857]


def test_a_seed_is_the_hash_of_its_canonical_text():
    digest = hashlib.blake2b(b"2:i7;4:sabc;", digest_size=8).digest()
    assert keyed_seed(7, "abc") == int.from_bytes(digest, "big") >> 1


def test_type_position_and_boundaries_of_parts_matter():
    names = [
        (1, "a"), ("1", "a"), ("a", 1), ("1a",), ("a1",), ("1", "", "a"), (1, "a", ""), ("", 1, "a"), (),
        ("",), ("i1",), ("s1",), (1,), ("1",), (-1,), (11,), (1, 1), ("1;1:s1",), ("1", "1"),
    ]  # fmt: skip
    assert len({keyed_seed(*name) for name in names}) == len(names)


@pytest.mark.parametrize("part", [1.0, True, None, b"a", np.int64(1), ("a",)])
def test_other_types_are_refused(part):
    with pytest.raises(TypeError, match="str or int"):
        keyed_seed("a", part)


def test_seeds_are_uniform_and_neighbours_are_independent():
    values = np.array([keyed_uniform(0, "x", index) for index in range(4096)])
    assert 0 <= values.min() and values.max() < 1
    # Kolmogorov-Smirnov distance, 1.63 / sqrt(n) is the 1% point
    grid = np.arange(1, 4097) / 4096
    assert np.abs(np.sort(values) - grid).max() < 1.95 / math.sqrt(4096)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(4096)
    # every bit of the 63 is a fair coin
    seeds = [keyed_seed(0, "x", index) for index in range(4096)]
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / 4096
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(4096)
    assert max(seeds) < 2**63


def test_choices_are_fair():
    counts = np.bincount([keyed_choice(7, "which", index) for index in range(7000)], minlength=7)
    assert counts.sum() == 7000 and len(counts) == 7
    assert ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square with 6 degrees of freedom at 0.1%


def test_orders_depend_on_values_and_name_only():
    items = [f"item {index}" for index in range(20)]
    order = keyed_order(items, 3, "prompts", 0)
    assert sorted(order) == sorted(items)
    assert keyed_order(reversed(items), 3, "prompts", 0) == order
    assert keyed_order(items, 3, "prompts", 1) != order != keyed_order(items, 4, "prompts", 0)
    # leaving one out keeps the order of the others
    assert keyed_order(items[1:], 3, "prompts", 0) == [item for item in order if item != items[0]]


def test_every_order_of_three_is_as_likely():
    orders = [tuple(keyed_order("abc", "order", index)) for index in range(6000)]
    counts = np.array([orders.count(order) for order in itertools.permutations("abc")])
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # 5 degrees of freedom at 0.1%


def test_generators_of_different_names_are_independent_and_normal():
    rows = torch.stack([torch.randn(64, generator=torch_generator(0, index)) for index in range(512)])
    assert abs(float(rows.mean())) < 4 / math.sqrt(rows.numel())
    assert abs(float(rows.var()) - 1) < 4 * math.sqrt(2 / rows.numel())
    correlation = torch.corrcoef(rows.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 6 / math.sqrt(512)
    assert torch.equal(rows[3], torch.randn(64, generator=torch_generator(0, 3)))
