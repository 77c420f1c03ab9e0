"""Configuration to objects: policy, prompts, rewards, ranking, engine, store, loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from diffexpo.algorithms import algorithm_class
from diffexpo.assembly.aliases import (
    named_prompts,
    negative_prompts,
    read_named,
    resolve,
    resolve_model,
)
from diffexpo.assembly.asking_people import ask_people
from diffexpo.assembly.evaluating import make_evaluator, make_validator, separate_prompts
from diffexpo.assembly.self_judges import open_denoiser
from diffexpo.assembly.starting import guidance_of_start, put_start
from diffexpo.config import RunConfig
from diffexpo.config.rules import guidance_notes, train_rewards
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.prompt_bank import PromptBank
from diffexpo.data.prompts import filter_long
from diffexpo.data.store import Store
from diffexpo.diffusion.transitions import sampler_transitions, stochastic_grid
from diffexpo.errors import ConfigError
from diffexpo.online.explore import own_negative
from diffexpo.online.loop import Console, Loop, Ranking
from diffexpo.online.self_play import data_prompts
from diffexpo.phases import phase
from diffexpo.policies.base import load_policy
from diffexpo.policies.family import FamilyPolicy
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.mixture import conflict_metrics, dominance, mix_rewards, uncertainty
from diffexpo.rewards.scoring import Budget, check_rewards, score_drawn
from diffexpo.rewards.step_judge import LatentStepJudge
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.training.signals import StopSignal
from diffexpo.types import Policy, Prompt

PROMPTS = "prompts"
"""Folder of the embeddings of a run that is not finished."""
KEPT_PROMPTS = 256 * 2**20
"""Bytes of embeddings that stay in memory beside the bank."""


def build_loop(config: RunConfig, run_dir: Path, console: Console, stop: StopSignal, world: World) -> Loop:
    """Every object of a run, with offline data imported."""
    policy = build_policy(config)
    put_start(config, run_dir, policy, world)
    # Samplers that do not fit the model, or lack a needed density, are refused before anything is spent.
    for sampler in (config.explore.sampler, config.evaluation.sampler):
        sampler_transitions(policy.path, sampler)
    if config.algorithm.draws_first:
        stochastic_grid(policy.path, config.explore.sampler)
    warn_of_guidance(config, policy, console)
    prompts = build_prompts(config, policy, console)
    # Everything that may be missing is looked for before the import, which can take hours.
    negatives, skipped = negative_prompts(config.explore.negatives.source)
    if skipped:
        console.line(skipped)
    rewards, judges, validation_judges = (
        load_rewards(
            [card for card in scorers if not card.asks_people],
            resolve,
            policy.device,
            partial(open_denoiser, config, policy),
        )
        for scorers in config.scorers.values()
    )
    step_judge = build_step_judge(config, policy)
    named_prompts(config.evaluation.prompts, "evaluation.prompts")
    separate_prompts(config, [] if config.algorithm.prompts_of_data else prompts)
    store = open_store(run_dir, world)
    if config.offline.source is not None:
        import_pairs(config, policy, store, console, stop.check, world)
    if config.algorithm.prompts_of_data:
        prompts = data_prompts(store)  # own images have to stand against data of the same prompt
    bank = PromptBank(run_dir / PROMPTS, policy.fingerprint, world)
    embeddings = PromptEmbeddings(policy, [""], max_bytes=KEPT_PROMPTS, bank=bank)
    metrics = MetricsWriter(run_dir / "metrics.jsonl", active=world.rank == 0)
    engine = make_engine(config, policy, embeddings, metrics, world, console)
    ranking, improving = build_ranking(config), None
    budget = Budget(f"the model that learns from {config.model.path}")
    if config.algorithm.improvement is not None:
        from diffexpo.assembly.improving import build_improving

        improving = build_improving(config, run_dir, policy, embeddings, store, judges, world, console)
    return Loop(
        config=config,
        run_dir=run_dir,
        policy=policy,
        engine=engine,
        store=store,
        prompts=prompts,
        negatives=negatives,
        embeddings=embeddings,
        score=lambda drawn, texts: score_drawn(rewards, drawn, texts, budget=budget),
        ranking=ranking,
        world=world,
        metrics=metrics,
        console=console,
        check_signals=stop.check,
        evaluate=make_evaluator(judges, rewards),
        initial=policy.weights.state("current"),
        step_judge=step_judge,
        improving=improving,
        validate=make_validator(validation_judges) if config.explore.keep == "best" else None,
        people=ask_people(config, run_dir, policy, store, ranking),
    )


def open_store(run_dir: Path, world: World) -> Store:
    """The store of a run or lane, whose complete stages the first process verifies (`Store.check`)."""
    store = Store(run_dir / "store")
    if world.rank == 0:
        store.check()
    return store


def make_engine(
    config: RunConfig,
    policy: Policy,
    embeddings: PromptEmbeddings,
    metrics: MetricsWriter,
    world: World,
    console: Console,
) -> Engine:
    """The engine that trains a run's policy by its method."""
    algorithm = algorithm_class(config.algorithm.type)(config.algorithm, embeddings.select([""]))
    return Engine(
        policy,
        algorithm,
        config.training,
        metrics,
        world=world,
        initial_loss=algorithm.settings.initial_loss,
        warn=console.warning,
    )


def build_policy(config: RunConfig) -> FamilyPolicy:
    """The base model with trainable weights on it."""
    policy = load_policy(
        config.model,
        config.tuning,
        folder_or_id=resolve_model(config.model.path),
        seed=config.seed,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    # Modules that cannot be merged are refused here, not when the first image is drawn.
    with policy.weights.use("current", merged=config.explore.merge_lora):
        return policy


@phase("loading scorers")
def build_step_judge(config: RunConfig, policy: Policy) -> LatentStepJudge | None:
    """The judge of noisy candidates, if the method has one; ConfigError if it cannot read this model."""
    branches = config.algorithm.branches
    if branches is None or branches.judge is None:
        return None
    judge = LatentStepJudge(resolve(branches.judge), resolve, policy.device)
    judge.check_fits(policy.latent_shape, policy.path.kind, "algorithm.judge", config.model.path)
    return judge


def warn_of_guidance(config: RunConfig, policy: FamilyPolicy, console: Console) -> None:
    """Say where settings of guidance do not go together, and where it is on for a model that its own pipeline
    runs without it (FLUX)."""
    for note in guidance_notes(config, guidance_of_start(config)):
        console.warning(note)
    default = policy.card.default_guidance
    for group, sampler in (("explore", config.explore.sampler), ("evaluation", config.evaluation.sampler)):
        if default is not None and sampler.guidance != default:
            console.warning(
                f"{group}.sampler.guidance = {sampler.guidance:g}: the model's own pipeline draws with "
                f"{default:g}, which is no classifier-free guidance and half the cost; set it to {default:g} "
                "unless you mean true guidance"
            )


def build_prompts(config: RunConfig, policy: FamilyPolicy, console: Console) -> list[Prompt]:
    """Training prompts, without those that are too long for the encoder (counted)."""
    prompts, skipped = read_named(config.prompts.source, "prompts.source")
    if skipped:
        console.line(skipped)
    if unused := unused_negatives(config, prompts):
        console.warning(unused)
    limit = config.prompts.max_tokens or policy.max_tokens
    kept, dropped = filter_long(prompts, policy.count_tokens, min(limit, policy.max_tokens))
    if not kept:
        advice = "shorten them" + (", or raise prompts.max_tokens" if config.prompts.max_tokens else "")
        reason = f"all {len(prompts)} prompts exceed {limit} tokens, none is left"
        raise ConfigError(f"prompts.source = {config.prompts.source}: {reason}; {advice}")
    if dropped:
        console.warning(f"prompts: {len(dropped)} of {len(prompts)} exceed {limit} tokens and are left out")
    return kept


def unused_negatives(config: RunConfig, prompts: Sequence[Prompt]) -> str:
    """Why negative prompts that come with prompts are not used, where that is so; else ""."""
    number, explore = sum(own_negative(prompt) is not None for prompt in prompts), config.explore
    is_off = explore.negatives.schedule == "off" or explore.negatives.initial == 0
    unguided = explore.negatives.mode == "cfg" and explore.sampler.guidance <= 1
    if not number or not config.algorithm.collects(config) or not (is_off or unguided):
        return ""
    setting = "explore.negatives is off" if is_off else "explore.sampler.guidance is not above 1"
    return f"prompts.source: {number} prompts have a negative_prompt, which is not used because {setting}"


def build_ranking(config: RunConfig) -> Ranking:
    """How the train rewards become one order."""
    rewards = [reward for reward in train_rewards(config) if not reward.asks_people]
    train = {reward.name: reward.weight for reward in rewards}
    alone = [reward.name for reward in rewards if not reward.is_groupwise]  # evaluations have these only
    kind, needs_uncertainty = config.mixture.kind, config.algorithm.needs_uncertainty

    def only(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: scores[name] for name in train}

    return Ranking(
        judge="+".join(train) if len(train) == 1 else f"{kind}({'+'.join(train)})",
        mix=lambda scores: mix_rewards(only(scores), train, kind),
        check=lambda scores: check_rewards({name: scores[name] for name in alone}),
        dominance=(lambda scores: dominance(only(scores), train)) if kind == "pareto" else None,
        uncertainty=(lambda scores: uncertainty(only(scores))) if needs_uncertainty else None,
        conflicts=lambda scores: conflict_metrics(scores, train),
    )


def import_pairs(
    config: RunConfig,
    policy: FamilyPolicy,
    store: Store,
    console: Console,
    check_signals: Callable[[], None],
    world: World,
) -> None:
    """D_off into the store as iteration 0, each image encoded once."""
    # Rank 0's answer is everybody's: see `online.loop.is_complete`.
    if world.broadcast_object(store.is_complete("offline", 0)):
        return
    with console.phase("import offline pairs", 0, "units of 256") as bar:

        def tick() -> None:
            bar.advance(1)
            check_signals()

        report = import_offline(
            resolve(str(config.offline.source)),
            policy,
            store,
            format=config.offline.format,
            limit=config.offline.limit,
            seed=config.seed,
            accepts_prompt=lambda text: policy.count_tokens([text])[0] <= policy.max_tokens,
            tick=tick,
            world=world,
        )
    console.line(report.describe())


def describe_policy(policy: Policy) -> str:
    """One phrase: path, latent shape, trained parameters."""
    trained = sum(parameter.numel() for parameter in policy.weights.trainable().values())
    shape = "x".join(str(side) for side in policy.latent_shape)
    return f"{policy.path.kind}, latents {shape}, {trained:,} trained parameters, {policy.device}"
