"""The largest memory of a run, from sizes alone: plain arithmetic on bytes, nothing is loaded.

    total = weights + versions + scorers + the largest of (train, draw, decode, encode texts)
    train = gradients + AdamW's two moments + average + activations

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


def training_items(
    trained: int,
    *,
    has_average: bool,
    held: PerRow,
    peak: PerRow,
    forward: PerRow,
    shape: TrainingShape,
    moved: int = 0,
) -> list[Item]:
    """What exists while an iteration trains.

    gradients = 4 trained,  moments = 8 trained,  average = 4 trained (bytes; float32 throughout)
    activations = max(peak(rows), held(rows) + forward(reference_rows) + moved, forward(prepass_rows) + moved)

    Args:
        trained: Number of trained elements.
        has_average: Whether a moving average is kept.
        held, peak, forward: Bytes alive after the forward pass; most in forward and backward; most in a pass
            without gradient.
        shape: How many rows there are.
        moved: Bytes of a frozen version that is on the device for its own pass only.
    """
    activations = max(
        peak.at(shape.rows),
        held.at(shape.rows) + (forward.at(shape.reference_rows) + moved if shape.reference_rows else 0),
        forward.at(shape.prepass_rows) + moved if shape.prepass_rows else 0,
    )
    count, size = f"{trained:,} float32", FLOAT32 * trained
    items = [
        Item("gradients", count, size, "train"),
        Item("AdamW moments", f"2 x {count}", 2 * size, "train"),
        *([Item("moving average", count, size, "train")] if has_average else []),
    ]
    return [*items, Item("activations, training", f"{shape.rows} rows", activations, "train")]


def drawing_items(
    images: int,
    *,
    rows_per_image: int,
    forward: PerRow,
    decoder: PerRow,
    image: int,
    is_sliced: bool,
    moved: int = 0,
    merged: int = 0,
) -> list[Item]:
    """What exists while images are drawn and decoded.

    Args:
        images: Images of one network call.
        rows_per_image: 2 with guidance, 3 with double guidance.
        forward, decoder: Most bytes alive in a pass of the denoiser without gradient, and of the decoder.
        image: Bytes of one decoded image.
        is_sliced: Images are decoded one at a time.
        moved: Bytes of a frozen version that is on the device while it draws, and while an evaluation decodes
            what it drew.
        merged: Bytes of weights with adapters folded into them, which exist while they draw.
    """
    rows = images * rows_per_image
    decoded = decoder.at(1 if is_sliced else images) + (images * image if is_sliced else 0)
    items = [
        Item("activations, drawing", f"{rows} rows", forward.at(rows), "draw"),
        Item("activations, decoding", f"{images} images", decoded, "decode"),
    ]
    if moved:
        phases = ("draw", "decode")
        items += [Item("a copy moved in", "the version that draws", moved, phase) for phase in phases]
    if merged:
        items.append(Item("merged weights", "adapted modules", merged, "draw"))
    return items
