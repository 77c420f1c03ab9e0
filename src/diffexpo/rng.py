"""Keyed randomness: every random number comes from a generator seeded by a hash of its *name*.

    seed(name) = first 63 bits of BLAKE2b( canonical text of (run seed, part, part, ...) )

A name is a tuple such as (run seed, iteration, "collect", agent, prompt id, sample index, "noise"). Call
order, batch size and process rank never enter, so one process equals two, a resumed run equals an
uninterrupted one, and any image can be drawn again from the row that describes it. Noise is drawn on the
CPU generator whatever the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch

Part = str | int


def keyed_seed(*parts: Part) -> int:
    """Seed in [0, 2**63) that depends on every part, its type and its position.

    Args:
        parts: Strings and integers that name the random number.
    Returns:
        A non-negative integer below 2**63; `keyed_seed(0, "a")` never changes between versions.
    Raises:
        TypeError: a part is neither str nor int (a float's text would depend on formatting).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (str, int)):
            raise TypeError(f"rng key parts are str or int, got {part!r}")
        text = f"{'i' if isinstance(part, int) else 's'}{part}"
        digest.update(f"{len(text)}:{text};".encode())
    return int.from_bytes(digest.digest(), "big") >> 1


def torch_generator(*parts: Part) -> torch.Generator:
    """CPU torch generator seeded by the name."""
    import torch

    return torch.Generator("cpu").manual_seed(keyed_seed(*parts))


def numpy_generator(*parts: Part) -> numpy.random.Generator:
    """NumPy generator seeded by the name."""
    import numpy

    return numpy.random.Generator(numpy.random.PCG64(keyed_seed(*parts)))


def keyed_uniform(*parts: Part) -> float:
    """One number in [0, 1) from the name alone, without a generator."""
    return keyed_seed(*parts) / 2.0**63


def keyed_choice(count: int, *parts: Part) -> int:
    """One index in [0, count) from the name alone (bias below count / 2**63)."""
    return keyed_seed(*parts) % count


def keyed_order(items: Iterable[str], *parts: Part) -> list[str]:
    """The items in an order that depends only on their values and the name."""
    return sorted(items, key=lambda item: (keyed_seed(*parts, item), item))
