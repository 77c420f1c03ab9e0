"""A learned baseline for the reward of each transition (DPOK): fitted to an iteration's transitions before
they are trained.

    A = r - V(x_t, prompt, t),   V fitted to r by a few steps of its own optimiser

Everything here is a function of the trajectories and of the network that the last iteration left, so a
resumed run fits the same network again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from diffexpo.config.methods.data import ValueBaseline
from diffexpo.data.draws import Epochs
from diffexpo.data.trajectories import Trajectories, TransitionRef, row_of
from diffexpo.diffusion.transitions import Transition
from diffexpo.online.loop import Loop, read_kept, write_kept
from diffexpo.rng import torch_generator
from diffexpo.training.optimizer import load_optimizer, optimizer_tensors
from diffexpo.types import FitsBaseline

CHUNK, NETWORK = 1024, "v"


def baseline_advantages(
    loop: Loop,
    iteration: int,
    trajectories: Trajectories,
    refs: Sequence[TransitionRef],
    grid: Sequence[Transition],
    settings: ValueBaseline,
) -> tuple[list[TransitionRef], dict[str, float]]:
    """Fit the baseline to the rewards that the transitions carry, and subtract it.

    Args:
        loop: The run; the fitted network is kept in its checkpoints.
        refs: Transitions whose `advantage` is the plain reward; one or more.
        grid: The sampler's steps.
    Returns:
        The same transitions with reward minus value, and the metric `train/value_loss` after fitting.
    """
    method = loop.engine.algorithm
    assert isinstance(method, FitsBaseline)  # its card names a baseline
    rewards = torch.tensor([ref.advantage for ref in refs], dtype=torch.float32)

    def inputs_of(part: Sequence[TransitionRef]) -> Tensor:
        x_t = torch.cat([row_of(trajectories, "latents", ref.place, ref.index) for ref in part])
        t = torch.tensor([grid[ref.index].t for ref in part], dtype=torch.float32)
        return method.value_inputs(x_t, t, loop.embeddings.select([ref.text for ref in part]))

    starts = range(0, len(refs), CHUNK)
    inputs = torch.cat([inputs_of(refs[start : start + CHUNK]) for start in starts])
    network = _fit(loop, iteration, method, settings, inputs, rewards)
    with torch.no_grad():
        values = torch.cat([network(part) for part in torch.split(inputs, CHUNK)])
    loss = float(method.value_loss(values, rewards).mean())
    advantages = (rewards - values).tolist()
    changed = [replace(ref, advantage=value) for ref, value in zip(refs, advantages, strict=True)]
    return changed, {"train/value_loss": loss}


def _fit(
    loop: Loop, iteration: int, method: FitsBaseline, settings: ValueBaseline, inputs: Tensor, rewards: Tensor
) -> nn.Module:
    """Some steps of AdamW from where the last iteration stopped."""
    generator = torch_generator(loop.config.seed, "baseline")
    network = method.value_network(
        inputs.shape[1], generator, float(rewards.mean()), max(float(rewards.std(correction=0)), 1e-6)
    )
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    earlier = read_kept(loop, "baseline", iteration - 1)
    if earlier:
        network.load_state_dict(earlier.pop(NETWORK))
        load_optimizer(optimizer, parameters, earlier)
    size = min(settings.batch_size, len(rewards))
    epochs = Epochs(np.ones(len(rewards)), (loop.config.seed, iteration, "baseline"))
    for step in range(settings.steps):
        rows = [i for i, _ in epochs.take(step * size, (step + 1) * size)]
        optimizer.zero_grad()
        loss = method.value_loss(network(inputs[rows]), rewards[rows]).mean()
        torch.autograd.backward(loss)
        optimizer.step()
    state = {NETWORK: network.state_dict(), **optimizer_tensors(optimizer, parameters)}
    write_kept(loop, "baseline", iteration, state)
    return network
