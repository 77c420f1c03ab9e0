"""The largest memory of a run, from sizes alone: plain arithmetic on bytes, nothing is loaded.

    total = weights + versions + scorers + the largest of (train, draw, decode, encode texts)
    train = gradients + AdamW's two moments + average + activations   (all but the last in float32)
    decode = images * (activations of one), or (activations of one) + decoded images where they come in slices

A row is one latent that passes the denoiser. A pair is two rows; a guided draw has two rows per image.
Activations grow in proportion to the rows, apart from the copies of weights in autocast's precision. Text
encoders leave the device once all texts are encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
FLOAT32 = 4
# Assumed, not measured here: what an accelerator's context and libraries take, and the share of the rest that
# its allocator can use.
CONTEXT = int(0.6 * GIB)
USABLE = 0.92
PHASES = ("always", "train", "draw", "decode", "encode texts")


@dataclass(frozen=True)
class Item:
    """One thing that takes memory: its count with the unit, its bytes and its phase (`always` for all)."""

    what: str
    count: str
    bytes: int
    phase: str = "always"


@dataclass(frozen=True)
class PerRow:
    """Bytes that grow with the rows, and bytes that do not."""

    row: int
    fixed: int = 0

    def at(self, rows: int) -> int:
        return self.row * rows + self.fixed


@dataclass(frozen=True)
class TrainingShape:
    """How many rows pass the denoiser at once.

    `rows` have a gradient together; `reference_rows` pass without one while the activations of `rows` are
    held. `prepass_rows` pass without a gradient before any activation is held (the first pass of
    `pair_gradient: two_pass`).
    """

    rows: int
    reference_rows: int = 0
    prepass_rows: int = 0

    def activations(self, *, held: PerRow, peak: PerRow, forward: PerRow, moved: int = 0) -> int:
        """Most bytes of activations at once.

        max(peak(rows), held(rows) + forward(reference_rows) + moved, forward(prepass_rows) + moved)

        Args:
            held, peak, forward: Bytes alive after the forward pass; most in forward and backward; most in a
                pass without gradient.
            moved: Bytes of a frozen version that is on the device for its own pass only.
        """
        return max(
            peak.at(self.rows),
            held.at(self.rows) + (forward.at(self.reference_rows) + moved if self.reference_rows else 0),
            forward.at(self.prepass_rows) + moved if self.prepass_rows else 0,
        )


def phase_bytes(items: Sequence[Item], phase: str) -> int:
    """Bytes of one phase alone."""
    return sum(item.bytes for item in items if item.phase == phase)


def largest_phase(items: Sequence[Item]) -> str:
    """The phase that decides the peak."""
    return max(PHASES[1:], key=lambda phase: phase_bytes(items, phase))


def peak_bytes(items: Sequence[Item]) -> int:
    """Most bytes held at once: what is always there and the largest phase; for items of 3 (always), 5 (train)
    and 4 (draw) bytes it is 8."""
    return phase_bytes(items, "always") + phase_bytes(items, largest_phase(items))


def fits(total: int, gib: float) -> bool:
    """Whether `total` bytes fit on a device of `gib` GiB besides its context and what its allocator cannot
    use."""
    return total + CONTEXT <= USABLE * gib * GIB
