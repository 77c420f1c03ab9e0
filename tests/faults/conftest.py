"""The tiny world, and a run to which nothing happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.points import Bench
from tests.world import world

__all__ = ["world"]


@pytest.fixture(scope="session")
def bench(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(world / "recipe.yaml", tmp_path_factory.mktemp("faults"))
    done = made.run("whole")
    assert done.code == 0, done.err
    return made
