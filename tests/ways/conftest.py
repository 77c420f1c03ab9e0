"""The tiny world, for the ways in which people use the package (see tests/world.py)."""

from tests.world import truth, world

__all__ = ["truth", "world"]
