"""Sampled trajectories of the iteration that is being trained: drawn and kept, replayed as a check,
forgotten.

What a trajectory passed through is kept besides the store until it is trained; images, rewards and final
latents stay. Ratios are to the policy that drew the images, so they serve one iteration alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffexpo.config.methods.data import TransitionPairs, Transitions
from diffexpo.config.schema import SamplerConfig
from diffexpo.data.rows import Sample
from diffexpo.data.trajectories import Trajectories
from diffexpo.diffusion.sampling import replay_transitions, sample_trajectory
from diffexpo.diffusion.transitions import stochastic_grid
from diffexpo.errors import TrainingError
from diffexpo.online.branching import branch_unit
from diffexpo.online.loop import Loop, kept_path
from diffexpo.online.units import Drawing, Tick, Unit, guidance_of, texts_of_row, unit_inputs
from diffexpo.rng import keyed_seed
from diffexpo.types import ChoosesSteps

# Elsewhere than on the CPU the replay may take other kernels than the rollout did, which rounds differently.
INEXACT_TOLERANCE = 1e-4


def trajectories_of(loop: Loop, iteration: int) -> Trajectories:
    """Where an iteration's trajectories lie until they are trained."""
    return Trajectories(loop.run_dir / "trajectories" / f"iteration-{iteration:04d}")


def iteration_sampler(loop: Loop, iteration: int) -> SamplerConfig:
    """The sampler of an iteration; a method may move a window of random steps over it."""
    sampler, method = loop.config.explore.sampler, loop.engine.algorithm
    if not isinstance(method, ChoosesSteps):
        return sampler
    window = method.random_steps(iteration, len(random_steps(loop, sampler)))
    return sampler if window is None else sampler.model_copy(update={"random_steps": window})


def random_steps(loop: Loop, sampler: SamplerConfig) -> list[int]:
    """The steps that draw noise, and so have a log-probability."""
    grid = stochastic_grid(loop.policy.path, sampler)
    return [index for index, step in enumerate(grid) if step.has_density]


def chosen_steps(loop: Loop, sampler: SamplerConfig, name: str) -> list[int]:
    """Which steps of a trajectory are trained: a share of the random ones, the first (noisiest) or a subset
    keyed by `name`."""
    data = loop.config.algorithm.data
    assert isinstance(data, Transitions | TransitionPairs)
    random = random_steps(loop, sampler)
    count = max(1, int(len(random) * data.fraction + 1e-9))
    if data.takes_first or count == len(random):
        return random[:count]
    order = sorted(random, key=lambda index: keyed_seed(loop.config.seed, "steps", name, index))
    return sorted(order[:count])


# ---- drawing -----------------------------------------------------------------------------------------------


def draw_and_keep(loop: Loop, trajectories: Trajectories, drawing: Drawing, unit: Unit, tick: Tick) -> Tensor:
    """Draw a unit and keep its trajectories, with their branches where steps branch; the final latents
    (B,C,h,w)."""
    branches, data = loop.config.algorithm.branches, loop.config.algorithm.data
    with drawing.policy.weights.use(unit.agent.version), loop.engine.autocast():
        if branches is not None:
            tensors = branch_unit(drawing, unit, branches, loop.step_judge, loop.ranking.mix, tick)
        else:
            conditioning, negative, noise = unit_inputs(drawing, unit)
            path = sample_trajectory(
                drawing.policy, conditioning, negative, drawing.sampler, noise, tick=tick
            )
            tensors = {"latents": path.latents, "log_probs": path.mean_log_probs}
            if isinstance(data, Transitions) and data.needs_means:
                tensors["means"] = path.means
    trajectories.write(unit.number, tensors)
    return tensors["latents"][-1]


def branch_metrics(loop: Loop, iteration: int, samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the iteration's branched steps that gave a pair; nothing where steps do not branch."""
    branches = loop.config.algorithm.branches
    if branches is None:
        return {}
    random = random_steps(loop, iteration_sampler(loop, iteration))
    branched = sum(index >= branches.first_transition for index in random)
    trajectories = trajectories_of(loop, iteration)
    units = {sample.unit for sample in samples}
    kept = sum(len(trajectories.part(unit, "branch_index")) for unit in units)
    return {"pairs/kept_fraction": kept / max(1, branched * len(samples))}


# ---- training ----------------------------------------------------------------------------------------------


def check_replay(loop: Loop, iteration: int) -> None:
    """Start-up self-check: the policy that drew a unit gives its transitions the log-prob that was recorded.

    The first unit's noisiest and last random steps are replayed in the batch they were drawn in.

    Raises:
        TrainingError: the difference is not 0 (beyond rounding, elsewhere than on the CPU in float32).
    """
    policy, settings, trajectories = loop.policy, loop.config.training, trajectories_of(loop, iteration)
    samples = [sample for sample in loop.store.samples(iteration) if sample.unit == 0]
    samples.sort(key=lambda sample: sample.place)
    texts, negatives = zip(*map(texts_of_row, samples), strict=True)
    sampler = iteration_sampler(loop, iteration)
    random = random_steps(loop, sampler)
    is_exact = policy.device.type == "cpu" and settings.mixed_precision == "no"
    for index in {random[0], random[-1]}:
        ends = trajectories.part(0, "latents", slice(index, index + 2)).to(policy.device)
        recorded = trajectories.part(0, "log_probs", slice(index, index + 1))[0]
        negative = guidance_of(loop.embeddings, sampler, negatives)
        with torch.no_grad(), loop.engine.autocast(), policy.weights.use("current"):
            replayed = replay_transitions(
                policy,
                sampler,
                torch.full((len(samples),), index),
                ends[0],
                ends[1],
                loop.embeddings.select(texts).to(policy.device),
                None if negative is None else negative.to(policy.device),
            ).log_prob.cpu()
        worst = float((replayed - recorded).abs().max())
        if not worst <= (0.0 if is_exact else INEXACT_TOLERANCE):
            raise TrainingError(
                f"iteration {iteration}: replaying step {index} of the sampler gives log-probs that differ "
                f"by {worst:.3g} from those recorded while drawing, expected 0: the ratio would not be 1 "
                "before the first update; turn off dropout and other randomness in the denoiser, and look "
                "for what differs between sampling and training"
            )


def forget(loop: Loop, iteration: int) -> None:
    """Remove what only the training of this iteration needed."""
    if loop.world.rank == 0:
        trajectories_of(loop, iteration).remove()
        for name in ("optimizer", "baseline"):
            kept_path(loop, name, iteration - 1).unlink(missing_ok=True)
