"""How much of one draw's margin is signal, measured in every iteration that trains on pairs of images.

start   the policy's own margins, e_l - e_w, before the first step
end     what the policy has changed of the reference's, (e_l - e_w) - (e_l_ref - e_w_ref), after the last step

Where policy and reference agree the second is 0, so the first iteration has nothing else to measure before it
trains. Both are on the iteration's first pairs, at draws of noise and time that training never sees; weights,
batches and all other random numbers stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from diffexpo.config import RunConfig
from diffexpo.data.pairs import PairLoader
from diffexpo.diffusion.signal import margin_signal
from diffexpo.online.cost import training_cost
from diffexpo.online.loop import Loop
from diffexpo.training.batches import micro_batches, move_batch
from diffexpo.types import MeasuresMargins

DRAWS = 8
"""Draws of noise and time of each pair that is measured."""
SHARE = 0.02
"""Network evaluations of both measurements together, at most, as a share of those of the training."""

Moment = Literal["start", "end"]


def measure_signal(loop: Loop, iteration: int, loader: object, moment: Moment) -> dict[str, float]:
    """Signal and noise of one draw's margin, under `signal/<moment>/`; every process calls it.

    Returns:
        `ratio` of signal to noise (`margin_signal`) with the ends `low` and `high` of its 95% interval over
        pairs; the number of `pairs`; and at the end `logit_noise`, the noise in units of the loss's logit,
        which has beta / 2 before the margin. Nothing where the method has no margins or fewer than two pairs
        are measured.
    """
    algorithm, card = loop.engine.algorithm, loop.config.algorithm
    if not isinstance(algorithm, MeasuresMargins) or not isinstance(loader, PairLoader):
        return {}
    # No pair comes twice within an epoch.
    count = min(num_signal_pairs(loop.config, iteration), loader.draws.epochs.length)
    if count < 2:
        return {}
    batch = replace(loader, batch_size=count, contrast_per_batch=0).batch(0)
    key = (loop.config.seed, iteration, "signal", moment)
    is_changed = moment == "end" and card.needs_reference
    found: list[list[float]] = []
    size, world = loop.config.training.micro_batch_size, loop.world
    for part, _ in micro_batches(batch, size, world.rank, world.size):
        part = move_batch(part, loop.policy.device)
        with loop.engine.autocast():
            margins = algorithm.margins(loop.policy, part, key, DRAWS, is_changed=is_changed)
        found += margins.tolist()
        loop.check_signals()
    signal = margin_signal(torch.tensor(world.gather_objects(found), dtype=torch.float64), key)
    values = {"ratio": signal.ratio, "low": signal.low, "high": signal.high, "pairs": count}
    if is_changed and card.logit_scale is not None:
        values["logit_noise"] = card.logit_scale * signal.noise
    return {f"signal/{moment}/{name}": value for name, value in values.items()}


def num_signal_pairs(config: RunConfig, iteration: int) -> int:
    """Pairs that an iteration measures: `algorithm.signal_pairs`, or as many as stay within `SHARE`."""
    card = config.algorithm
    # At the start the policy alone runs, at the end the reference too.
    evaluations = card.data.images_per_row * DRAWS * (2 + card.needs_reference)
    return min(card.margin_pairs, int(SHARE * training_cost(config, iteration) / evaluations))
