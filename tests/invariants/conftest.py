"""The tiny world and one uninterrupted run in it (see tests/world.py)."""

from tests.commands import diffexpo, in_two_processes, kill_when
from tests.world import (
    SIGINT,
    SIGKILL,
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
    "in_two_processes",
    "kill_when",
    "pair_rows",
    "run_arguments",
    "truth",
    "weights",
    "world",
]
