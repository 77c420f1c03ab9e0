r"""The outer loop of everything that learns from sampled trajectories: collect, train, evaluate, repeat.

    for t = 1 .. T:
        collect D_t with p_{t-1}, keeping every step of the sampler;  score
        advantages of its images (or pairs of them)
        p_t = train(init p_{t-1}, D_t): passes over its transitions in keyed orders
        evaluate p_t

Unlike in `iterate` the images of an iteration serve that iteration alone: ratios are to the policy that drew
them. What a trajectory passed through is kept beside the store until it is trained; images, rewards and final
latents stay. Every stage looks at its manifest and skips what is complete, so the loop can die anywhere and
be started again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.algorithms import (
    D3poConfig,
    DdpoConfig,
    DpokConfig,
    FlowGrpoConfig,
    PrdpConfig,
    ReferencedConfig,
    SpoConfig,
    TrajectoryConfig,
)
from diffexpo.config.schema import RunConfig, SamplerConfig
from diffexpo.data.rows import Sample
from diffexpo.data.trajectories import (
    Place,
    Trajectories,
    TransitionLoader,
    TransitionPairLoader,
    TransitionPairRef,
    TransitionRef,
    read_branch,
)
from diffexpo.diffusion.sampling import replay_transitions, sample_trajectory
from diffexpo.diffusion.transitions import Transition, stochastic_grid
from diffexpo.errors import TrainingError
from diffexpo.online.advantages import PerPromptStats, group_advantages
from diffexpo.online.agents import Agent
from diffexpo.online.baseline import baseline_advantages, baseline_path
from diffexpo.online.branching import Branching, branch_unit
from diffexpo.online.collect import (
    Drawing,
    Tick,
    Unit,
    group_rows,
    guidance_of,
    noise_of,
    texts_of_row,
    unit_inputs,
)
from diffexpo.online.cost import transition_training_cost
from diffexpo.online.iterate import (
    Loop,
    draw_images,
    is_complete,
    keep_iterate,
    load_iterate,
    mixed_rewards,
    pair,
    reward_metrics,
    stack_rewards,
    ticking,
)
from diffexpo.rng import keyed_seed
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.training.optimizer import OptimizerState
from diffexpo.types import TrajectoryBatch, TrajectoryPairBatch

BATCH_TYPES = (TrajectoryBatch, TrajectoryPairBatch)
# Elsewhere than on the CPU the replay may take other kernels than the rollout did, which rounds differently.
INEXACT_TOLERANCE = 1e-4


class HasWindow(Protocol):
    """A method that draws and trains only a window of the steps."""

    def random_steps(self, iteration: int, num_transitions: int) -> tuple[int, int] | None: ...


class HasMinMargin(Protocol):
    """A method that keeps pairs of candidates by the gap of their scores."""

    min_margin: float


def run(loop: Loop, on_iterate: Callable[[Loop, int], None], until: tuple[str, int] | None = None) -> None:
    """Run every stage that is not complete, in order; as `iterate.run`.

    Args:
        loop: The run.
        on_iterate: Called with each new iterate (the evaluation, which stands above this room).
        until: Stop after this (stage, iteration), e.g. ("collect", 1).
    Raises:
        Interrupted: a signal arrived; everything up to here is saved.
    """
    stages: dict[str, Callable[[Loop, int], object]] = {
        "collect": collect_iteration,
        "pair": pair,
        "train": train,
        "evaluate": on_iterate,
    }
    for stage, iteration in schedule(loop.config):
        stages[stage](loop, iteration)
        if until == (stage, iteration):
            return


def schedule(config: RunConfig) -> list[tuple[str, int]]:
    """The stages of a run in order: (stage, iteration). Only D3PO makes pairs of images."""
    stages = ["collect", "pair", "train", "evaluate"]
    if not isinstance(config.algorithm, D3poConfig):
        stages.remove("pair")
    return [(stage, iteration) for iteration in range(1, config.explore.iterations + 1) for stage in stages]


def collect_iteration(loop: Loop, iteration: int) -> None:
    """The newest policy draws images for this iteration's prompts; their trajectories are kept until they are
    trained."""
    if is_complete(loop, "collect", iteration):
        return
    load_iterate(loop, iteration - 1, "current")
    draw = partial(_draw_and_keep, loop, trajectories_of(loop, iteration))
    if isinstance(loop.config.algorithm, SpoConfig):
        draw = partial(_branch_and_keep, loop, trajectories_of(loop, iteration))

    def measure(groups: list[list[Sample]]) -> dict[str, float]:
        if iteration == 1:
            loop.ranking.check(stack_rewards(groups))
        return reward_metrics(loop, groups) | _branch_metrics(loop, iteration, groups)

    draw_images(loop, iteration, [agent_of(loop)], iteration_sampler(loop, iteration), measure, draw)


def agent_of(loop: Loop) -> Agent:
    """The one agent of this loop: p_{t-1} is the main agent of iteration t, as everywhere."""
    explore, weights = loop.config.explore, loop.policy.weights
    uses_negatives = explore.negatives.source is not None and explore.negatives.schedule != "off"
    return Agent("main", "current", explore.images_per_prompt, uses_negatives, weights.fingerprint("current"))


def train(loop: Loop, iteration: int) -> None:
    """Train p_t from p_{t-1} on the transitions of D_t, going on with the optimiser's state of p_{t-1}."""
    trajectories = trajectories_of(loop, iteration)
    if is_complete(loop, "train", iteration):
        _forget(loop, iteration, trajectories)
        return
    config, weights = loop.config, loop.policy.weights
    load_iterate(loop, iteration - 1, "current")
    algorithm = config.algorithm
    is_moving = isinstance(algorithm, ReferencedConfig) and algorithm.reference == "previous"
    weights.copy("current" if is_moving else "base", "reference")
    began = time.monotonic()
    loader, payload = LOADERS[type(algorithm)](loop, iteration, trajectories)
    if loader.size == 0:
        loop.console.warning(
            f"iteration {iteration}: no transition has anything to teach (rewards equal within every prompt, "
            f"or failed); "
            "the policy stays as it is"
        )
        _keep_optimizer(loop, iteration, read_optimizer(loop, iteration - 1))
    else:
        check_replay(loop, iteration, trajectories)
        loop.console.line(f"iteration {iteration}: training on {loader.describe()}")
        total = config.training.steps * loop.engine.micro_steps
        with ticking(loop, f"train {iteration}", total, "micro-batches") as tick:
            report = loop.engine.train_iteration(
                iteration,
                loader,
                steps=config.training.steps,
                checkpoint_dir=loop.run_dir / "checkpoints" / f"iteration-{iteration:04d}",
                run_seed=config.seed,
                tick=tick,
                optimizer_state=read_optimizer(loop, iteration - 1),
                is_checked=iteration == 1,
            )
        _keep_optimizer(loop, iteration, report.optimizer_state)
        payload = report.metrics() | payload
        payload["cost/network_evaluations"] = transition_training_cost(config)
    payload |= {"transitions/available": loader.size, "time/train_s": time.monotonic() - began}
    keep_iterate(loop, iteration, payload)
    _forget(loop, iteration, trajectories)


def check_replay(loop: Loop, iteration: int, trajectories: Trajectories) -> None:
    """Start-up self-check: the policy that drew a unit gives its transitions the log-prob that was recorded.

    The first unit's noisiest and last random steps are replayed in the batch they were drawn in.

    Raises:
        TrainingError: the difference is not 0 (beyond rounding, elsewhere than on the CPU in float32).
    """
    policy, settings = loop.policy, loop.config.training
    samples = [sample for sample in loop.store.samples(iteration) if sample.unit == 0]
    samples.sort(key=lambda sample: sample.batch_position)
    texts, negatives = zip(*map(texts_of_row, samples), strict=True)
    sampler = iteration_sampler(loop, iteration)
    random = _random_steps(loop, sampler)
    is_exact = policy.device.type == "cpu" and settings.mixed_precision == "no"
    for index in {random[0], random[-1]}:
        ends = trajectories.part(0, "latents", slice(index, index + 2)).to(policy.device)
        recorded = trajectories.part(0, "log_probs", slice(index, index + 1))[0]
        conditioning = loop.embeddings.select(texts).to(policy.device)
        negative = guidance_of(loop.embeddings, sampler, negatives)
        with torch.no_grad(), loop.engine.autocast(), policy.weights.use("current"):
            replayed = replay_transitions(
                policy,
                sampler,
                torch.full((len(samples),), index),
                ends[0],
                ends[1],
                conditioning,
                None if negative is None else negative.to(policy.device),
            ).log_prob.cpu()
        worst = float((replayed - recorded).abs().max())
        if not worst <= (0.0 if is_exact else INEXACT_TOLERANCE):
            raise TrainingError(
                f"iteration {iteration}: replaying step {index} of the sampler gives log-probs that differ "
                f"by {worst:.3g} from "
                "those recorded while drawing, expected 0: the ratio would not be 1 before the first update; "
                "turn off "
                "dropout and other randomness in the denoiser, and look for what differs between sampling "
                "and training"
            )


# ---- what is learned from ----------------------------------------------------------------------------------


def image_advantages(loop: Loop, iteration: int) -> list[tuple[Sample, float]]:
    """Each image of the iteration with its advantage, clipped; NaN where scoring failed.

    DDPO's running rewards are those of all collections so far, read from the store: there is no state beside
    it.
    """
    settings = loop.config.algorithm
    groups = group_rows(loop.store.samples(iteration))
    samples = [sample for group in groups for sample in group]
    if isinstance(settings, DdpoConfig):
        stats = PerPromptStats(settings.buffer_size, settings.min_count)
        for number in range(1, iteration + 1):
            earlier = group_rows(loop.store.samples(number))
            prompts = [sample.prompt_id for group in earlier for sample in group]
            advantages = stats.update(prompts, mixed_rewards(loop, earlier).ravel())
    else:
        assert isinstance(settings, FlowGrpoConfig)
        labels = [sample.group for sample in samples]
        rewards = mixed_rewards(loop, groups).ravel()
        advantages = group_advantages(rewards, labels, global_std=settings.global_std)
    clipped = np.clip(advantages, -settings.advantage_clip, settings.advantage_clip)
    return list(zip(samples, clipped.tolist(), strict=True))


def chosen_steps(loop: Loop, sampler: SamplerConfig, name: str) -> list[int]:
    """Which steps of a trajectory are trained: a share of the random ones.

    Flow-GRPO takes the first (noisiest) ones, as its authors do; the others a random subset keyed by `name`.
    """
    settings = loop.config.algorithm
    assert isinstance(settings, TrajectoryConfig)
    random = _random_steps(loop, sampler)
    count = max(1, int(len(random) * settings.timestep_fraction + 1e-9))
    if isinstance(settings, FlowGrpoConfig) or count == len(random):
        return random[:count]
    order = sorted(random, key=lambda index: keyed_seed(loop.config.seed, "steps", name, index))
    return sorted(order[:count])


def iteration_sampler(loop: Loop, iteration: int) -> SamplerConfig:
    """The sampler of an iteration: MixGRPO's window of random steps moves, everything else stays."""
    sampler = loop.config.explore.sampler
    if not isinstance(loop.config.algorithm, FlowGrpoConfig):
        return sampler
    method: HasWindow = loop.engine.algorithm  # type: ignore[assignment]
    window = method.random_steps(iteration, len(_random_steps(loop, sampler)))
    return sampler if window is None else sampler.model_copy(update={"random_steps": window})


def trajectories_of(loop: Loop, iteration: int) -> Trajectories:
    """Where an iteration's trajectories lie until they are trained."""
    return Trajectories(loop.run_dir / "trajectories" / f"iteration-{iteration:04d}")


Payload = dict[str, float]
AnyLoader = TransitionLoader | TransitionPairLoader


def _image_loader(loop: Loop, iteration: int, trajectories: Trajectories) -> tuple[AnyLoader, Payload]:
    """Every transition has its image's advantage; images with none, or with exactly 0, are left out."""
    sampler = iteration_sampler(loop, iteration)
    refs = [
        ref
        for sample, advantage in image_advantages(loop, iteration)
        if np.isfinite(advantage) and advantage != 0
        for ref in _refs_of(loop, sampler, sample, advantage)
    ]
    return _transition_loader(loop, iteration, trajectories, sampler, refs), {}


def _baseline_loader(loop: Loop, iteration: int, trajectories: Trajectories) -> tuple[AnyLoader, Payload]:
    """Every transition has its image's reward minus the baseline's value there, or the reward alone."""
    sampler = iteration_sampler(loop, iteration)
    groups = group_rows(loop.store.samples(iteration))
    rewards = mixed_rewards(loop, groups).ravel().tolist()
    refs = [
        ref
        for sample, reward in zip((one for group in groups for one in group), rewards, strict=True)
        if np.isfinite(reward)
        for ref in _refs_of(loop, sampler, sample, reward)
    ]
    payload: Payload = {}
    settings = loop.config.algorithm
    assert isinstance(settings, DpokConfig)
    if settings.has_value_baseline and refs:
        refs, payload = baseline_advantages(
            loop, iteration, trajectories, refs, stochastic_grid(loop.policy.path, sampler)
        )
    return _transition_loader(loop, iteration, trajectories, sampler, refs), payload


def _refs_of(loop: Loop, sampler: SamplerConfig, sample: Sample, advantage: float) -> list[TransitionRef]:
    text, negative = texts_of_row(sample)
    name, place = sample.sample_id, _place(sample)
    return [
        TransitionRef(name, place, index, advantage, text, negative)
        for index in chosen_steps(loop, sampler, name)
    ]


def _transition_loader(
    loop: Loop,
    iteration: int,
    trajectories: Trajectories,
    sampler: SamplerConfig,
    refs: Sequence[TransitionRef],
) -> TransitionLoader:
    return TransitionLoader(
        trajectories,
        refs,
        loop.embeddings,
        sampler,
        batch_size=loop.config.training.batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        needs_means=loop.engine.algorithm.needs_old_means,
    )


def _decided_loader(loop: Loop, iteration: int, trajectories: Trajectories) -> tuple[AnyLoader, Payload]:
    """D3PO: the pairs of the pair stage, each step of their trajectories by itself."""
    samples = {sample.sample_id: sample for sample in loop.store.samples(iteration)}
    couples = [
        (pair.pair_id, samples[pair.winner_id], samples[pair.loser_id])
        for pair in loop.store.pairs(iteration)
    ]
    return _couple_loader(loop, iteration, trajectories, couples, whole_pairs=False), {}


def _every_pair_loader(loop: Loop, iteration: int, trajectories: Trajectories) -> tuple[AnyLoader, Payload]:
    """PRDP: every two scored images of a prompt, with all steps together."""
    groups = group_rows(loop.store.samples(iteration))
    couples = []
    for group, rewards in zip(groups, mixed_rewards(loop, groups), strict=True):
        usable = [place for place in range(len(group)) if np.isfinite(rewards[place])]
        couples += [
            (f"{group[i].sample_id}+{group[j].sample_id}", group[i], group[j])
            for number, i in enumerate(usable)
            for j in usable[number + 1 :]
        ]
    return _couple_loader(loop, iteration, trajectories, couples, whole_pairs=True), {}


def _couple_loader(
    loop: Loop,
    iteration: int,
    trajectories: Trajectories,
    couples: Sequence[tuple[str, Sample, Sample]],
    *,
    whole_pairs: bool,
) -> TransitionPairLoader:
    sampler = iteration_sampler(loop, iteration)
    groups = group_rows(loop.store.samples(iteration))
    mixed = mixed_rewards(loop, groups)
    rewards = {
        sample.sample_id: float(value)
        for group, values in zip(groups, mixed, strict=True)
        for sample, value in zip(group, values, strict=True)
    }
    refs = [
        TransitionPairRef(
            pair_id,
            index,
            _place(winner),
            _place(loser),
            rewards[winner.sample_id],
            rewards[loser.sample_id],
            *texts_of_row(winner),
        )
        for pair_id, winner, loser in couples
        for index in chosen_steps(loop, sampler, pair_id)
    ]
    return TransitionPairLoader(
        trajectories,
        refs,
        loop.embeddings,
        sampler,
        batch_size=loop.config.training.batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        whole_pairs=whole_pairs,
    )


def _branch_loader(loop: Loop, iteration: int, trajectories: Trajectories) -> tuple[AnyLoader, Payload]:
    """SPO: best and worst candidate of each branched step that decided."""
    sampler = iteration_sampler(loop, iteration)
    by_unit: dict[int, dict[int, Sample]] = {}
    for sample in loop.store.samples(iteration):
        by_unit.setdefault(sample.unit, {})[sample.batch_position] = sample
    refs = []
    for unit, samples in sorted(by_unit.items()):
        index, position, scores = (
            trajectories.part(unit, f"branch_{name}").tolist() for name in ("index", "row", "scores")
        )
        for number, (step, place, gap) in enumerate(zip(index, position, scores, strict=True)):
            sample, here = samples[place], Place(unit, number)
            if step in chosen_steps(loop, sampler, sample.sample_id):
                name = f"{sample.sample_id}:{step}"
                refs.append(TransitionPairRef(name, step, here, here, *gap, *texts_of_row(sample)))
    loader = TransitionPairLoader(
        trajectories,
        refs,
        loop.embeddings,
        sampler,
        batch_size=loop.config.training.batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
        read=read_branch,
    )
    return loader, {}


LOADERS: dict[type, Callable[[Loop, int, Trajectories], tuple[AnyLoader, Payload]]] = {
    DdpoConfig: _image_loader,
    FlowGrpoConfig: _image_loader,
    DpokConfig: _baseline_loader,
    D3poConfig: _decided_loader,
    PrdpConfig: _every_pair_loader,
    SpoConfig: _branch_loader,
}
"""What gives an iteration's batches, and metrics of making it, by the method's settings."""


# ---- keeping -----------------------------------------------------------------------------------------------


def _draw_and_keep(
    loop: Loop, trajectories: Trajectories, drawing: Drawing, unit: Unit, tick: Tick
) -> Tensor:
    """Draw a unit and keep its trajectories; the final latents (B,C,h,w)."""
    keys, texts, negatives = unit_inputs(drawing, unit)
    embeddings, sampler, policy = drawing.embeddings, drawing.sampler, drawing.policy
    with policy.weights.use(unit.agent.version), loop.engine.autocast():
        trajectory = sample_trajectory(
            policy,
            embeddings.select(texts),
            guidance_of(embeddings, sampler, negatives),
            sampler,
            noise_of(policy, keys, unit.bucket),
            tick=tick,
        )
    tensors = {"latents": trajectory.latents, "log_probs": trajectory.mean_log_probs}
    if getattr(loop.engine.algorithm, "needs_old_means", False):
        tensors["means"] = trajectory.means
    trajectories.write(unit.number, tensors)
    return trajectory.latents[-1]


def _branch_and_keep(
    loop: Loop, trajectories: Trajectories, drawing: Drawing, unit: Unit, tick: Tick
) -> Tensor:
    """Draw a unit with branched steps and keep trajectories and branches; the final latents (B,C,h,w)."""
    settings = loop.config.algorithm
    assert isinstance(settings, SpoConfig)
    method: HasMinMargin = loop.engine.algorithm  # type: ignore[assignment]
    branching = Branching(
        settings.num_candidates, settings.first_transition, method.min_margin, loop.step_judge
    )
    with drawing.policy.weights.use(unit.agent.version), loop.engine.autocast():
        tensors = branch_unit(drawing, unit, branching, loop.ranking.mix, tick)
    trajectories.write(unit.number, tensors)
    return tensors["latents"][-1]


def _branch_metrics(loop: Loop, iteration: int, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    settings = loop.config.algorithm
    if not isinstance(settings, SpoConfig):
        return {}
    random = _random_steps(loop, iteration_sampler(loop, iteration))
    branched = sum(index >= settings.first_transition for index in random)
    units = {sample.unit for group in groups for sample in group}
    trajectories = trajectories_of(loop, iteration)
    kept = sum(len(trajectories.part(unit, "branch_index")) for unit in units)
    return {"pairs/kept_fraction": kept / max(1, branched * sum(map(len, groups)))}


def read_optimizer(loop: Loop, iteration: int) -> OptimizerState | None:
    """The optimiser's state at the end of an iteration; None: there is none yet."""
    path = optimizer_path(loop, iteration)
    if not path.exists():
        return None
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(path).items():
        kind, _, parameter = name.partition("/")
        state.setdefault(kind, {})[parameter] = tensor
    return state or None


def optimizer_path(loop: Loop, iteration: int) -> Path:
    """Where the optimiser's state at the end of an iteration is kept until the next one is trained."""
    return loop.run_dir / "checkpoints" / f"optimizer-{iteration:04d}.safetensors"


def _keep_optimizer(loop: Loop, iteration: int, state: OptimizerState | None) -> None:
    """Before the manifest: an iteration that is complete has its state."""
    if loop.world.rank == 0:
        flat: Mapping[str, Tensor] = {
            f"{kind}/{name}": tensor
            for kind, named in (state or {}).items()
            for name, tensor in named.items()
        }
        write_tensors(optimizer_path(loop, iteration), flat)


def _forget(loop: Loop, iteration: int, trajectories: Trajectories) -> None:
    """Remove what only the training of this iteration needed."""
    if loop.world.rank == 0:
        trajectories.remove()
        for path in (optimizer_path(loop, iteration - 1), baseline_path(loop, iteration - 1)):
            path.unlink(missing_ok=True)


def _place(sample: Sample) -> Place:
    return Place(sample.unit, sample.batch_position)


def _random_steps(loop: Loop, sampler: SamplerConfig) -> list[int]:
    grid: list[Transition] = stochastic_grid(loop.policy.path, sampler)
    return [index for index, step in enumerate(grid) if step.has_density]
