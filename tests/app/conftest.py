"""The tiny world, and commands in it."""

import pytest

from tests import commands
from tests.world import world

__all__ = ["command", "world"]


@pytest.fixture(scope="session")
def command():
    """command(argument, ..., limit=bytes, arm=pattern) runs `diffexpo`."""
    return commands.command
