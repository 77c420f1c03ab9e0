"""The phases of a run, as far as memory is concerned: an error carries the names of those it was raised in,
so that whoever explains it knows what was at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PHASES = (
    "exporting",
    "loading scorers",
    "loading the model",
    "scoring images",
    "encoding prompts",
    "encoding images",
    "decoding images",
    "training",
    "drawing images",
)
"""In the order in which they are asked: what runs inside another comes before it."""
_MARK = "_diffexpo_phases"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the errors of a block, or of a function that it decorates, with a phase.

    Args:
        name: One of `PHASES`.
    """
    try:
        yield
    except Exception as error:
        vars(error).setdefault(_MARK, set()).add(name)
        raise


def phase_of(*errors: BaseException) -> str | None:
    """The first of `PHASES` that any of the errors passed through; None: none of them did."""
    seen = {name for error in errors for name in vars(error).get(_MARK, ())}
    return next((name for name in PHASES if name in seen), None)
