"""Settings of an improvement model. Imports without torch."""

from __future__ import annotations

from pydantic import Field

from diffexpo.config.section import Count, Fraction, NotNegative, Positive, Section


class ImproverConfig(Section):
    """The improvement model: what it is trained on, and how it draws winners."""

    path: str | None = None
    """Folder of a trained improvement model to use; null trains one on the offline pairs before the first
    iteration."""
    steps: Count = 200_000
    """Optimiser steps of its training (the paper: up to 200,000)."""
    batch_size: Count = 2048
    """Pairs per step (the paper: 2048)."""
    micro_batch_size: Count = 8
    """Pairs per forward."""
    learning_rate: Positive = 1e-4
    """AdamW learning rate (the paper: 1e-4). Other settings of the optimiser are those of `training`."""
    ema_decay: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Moving average of its weights, which then are the model; 0 is off (the paper names none)."""
    checkpoint_every: Count = 1000
    """Optimiser steps between checkpoints of its training."""
    task_probabilities: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)
    """Shares of the tasks: improve (text and loser to winner), reconstruct (an image to itself),
    unconditional. The paper trains on "a mixture" without numbers."""
    text_scale: NotNegative = 3.5
    """s_T of double guidance when it draws winners: how far towards the prompt (the paper: 3.5)."""
    image_scale: NotNegative = 3.0
    """s_I: how close to the loser (the paper: 3.0)."""
    sampler_steps: int | None = Field(default=None, ge=1)
    """Steps when it draws winners; null takes those of `explore.sampler`, whose other settings hold but for
    guidance."""
