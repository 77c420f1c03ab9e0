"""The tiny world and one uninterrupted run in it (see tests/world.py)."""

from tests.world import (
    SIGINT,
    SIGKILL,
    diffexpo,
    environment,
    kill_when,
    pair_rows,
    run_arguments,
    truth,
    weights,
    world,
)

__all__ = [
    "SIGINT",
    "SIGKILL",
    "diffexpo",
    "environment",
    "kill_when",
    "pair_rows",
    "run_arguments",
    "truth",
    "weights",
    "world",
]
