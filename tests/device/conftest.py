"""The pretend accelerator, registered before any test runs and present in the tests of this folder alone; the tiny world."""

from collections.abc import Iterator

import pytest
import torch

from tests.device import pretend
from tests.world import world

__all__ = ["world"]

pretend.install()


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """`pretend:0`, found by `torch.accelerator` during the test."""
    with pretend.present() as found:
        yield found
