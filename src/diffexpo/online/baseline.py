"""A learned baseline for the reward of each transition (DPOK): fitted to an iteration's transitions before
they are trained.

    A = r - V(x_t, prompt, t),   V fitted to r by a few steps of its own optimiser

Everything here is a function of the trajectories and of the network that the last iteration left, so a
resumed run fits the same network again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffexpo.config.methods.data import ValueBaseline
from diffexpo.data.draws import Epochs
from diffexpo.data.trajectories import Trajectories, TransitionRef, row_of
from diffexpo.diffusion.transitions import Transition
from diffexpo.online.loop import Loop
from diffexpo.rng import torch_generator
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.training.optimizer import load_optimizer, optimizer_tensors
from diffexpo.types import FitsBaseline

CHUNK = 1024


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
        iteration: Whose transitions.
        trajectories: Where they lie.
        refs: Transitions whose `advantage` is the plain reward; one or more.
        grid: The sampler's steps.
        settings: How the network is fitted.
    Returns:
        The same transitions with reward minus value, and the metric `train/value_loss` after fitting.
    """
    method = loop.engine.algorithm
    assert isinstance(method, FitsBaseline)  # its card names a baseline
    rewards = torch.tensor([ref.advantage for ref in refs], dtype=torch.float32)
    inputs = torch.cat(
        [
            _inputs(loop, method, trajectories, refs[start : start + CHUNK], grid)
            for start in range(0, len(refs), CHUNK)
        ]
    )
    network = _fit(loop, iteration, method, settings, inputs, rewards)
    with torch.no_grad():
        values = torch.cat([network(part) for part in torch.split(inputs, CHUNK)])
    loss = float(method.value_loss(values, rewards).mean())
    advantages = (rewards - values).tolist()
    changed = [replace(ref, advantage=value) for ref, value in zip(refs, advantages, strict=True)]
    return changed, {"train/value_loss": loss}


def baseline_path(loop: Loop, iteration: int) -> Path:
    """Where the network fitted in an iteration is kept until the next one is trained."""
    return loop.run_dir / "checkpoints" / f"baseline-{iteration:04d}.safetensors"


def _fit(
    loop: Loop, iteration: int, method: FitsBaseline, settings: ValueBaseline, inputs: Tensor, rewards: Tensor
) -> nn.Module:
    """Some steps of AdamW from where the last iteration stopped; the result is written by the first
    process."""
    generator = torch_generator(loop.config.seed, "baseline")
    network = method.value_network(
        inputs.shape[1], generator, float(rewards.mean()), max(float(rewards.std(correction=0)), 1e-6)
    )
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    earlier = baseline_path(loop, iteration - 1)
    if earlier.exists():
        saved = read_tensors(earlier)
        network.load_state_dict({name[2:]: value for name, value in saved.items() if name.startswith("v/")})
        state: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.items():
            kind, _, parameter = name.partition("/")
            if kind != "v":
                state.setdefault(kind, {})[parameter] = value
        load_optimizer(optimizer, parameters, state)
    size = min(settings.batch_size, len(rewards))
    epochs = Epochs(np.ones(len(rewards)), (loop.config.seed, iteration, "baseline"))
    for step in range(settings.steps):
        rows = [i for i, _ in epochs.take(step * size, (step + 1) * size)]
        optimizer.zero_grad()
        loss = method.value_loss(network(inputs[rows]), rewards[rows]).mean()
        torch.autograd.backward(loss)
        optimizer.step()
    if loop.world.rank == 0:
        tensors = {f"v/{name}": value for name, value in network.state_dict().items()}
        for kind, named in optimizer_tensors(optimizer, parameters).items():
            tensors |= {f"{kind}/{name}": value for name, value in named.items()}
        write_tensors(baseline_path(loop, iteration), tensors)
    return network


def _inputs(
    loop: Loop,
    method: FitsBaseline,
    trajectories: Trajectories,
    refs: Sequence[TransitionRef],
    grid: Sequence[Transition],
) -> Tensor:
    x_t = torch.cat([row_of(trajectories, "latents", ref.place, ref.index) for ref in refs])
    t = torch.tensor([grid[ref.index].t for ref in refs], dtype=torch.float32)
    return method.value_inputs(x_t, t, loop.embeddings.select([ref.text for ref in refs]))
