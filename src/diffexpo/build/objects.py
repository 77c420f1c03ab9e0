"""Configuration to objects: policy, prompts, rewards, ranking, engine, store, loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffexpo.algorithms import ALGORITHMS
from diffexpo.build.aliases import named_prompts, resolve
from diffexpo.build.evaluating import make_evaluator
from diffexpo.config import RunConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.offline.ingest import import_offline
from diffexpo.data.prompts import filter_long, load_prompts
from diffexpo.data.store import Store
from diffexpo.diffusion.transitions import sampler_grid
from diffexpo.online.iterate import Console, Loop, Ranking
from diffexpo.policies.base import load_policy
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.mixture import dominance, mix_rewards, uncertainty
from diffexpo.rewards.scoring import check_rewards, score_images
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.training.signals import StopSignal
from diffexpo.types import Algorithm, Policy, Prompt


def build_loop(config: RunConfig, run_dir: Path, console: Console, stop: StopSignal, world: World) -> Loop:
    """Every object of a run, with offline data imported."""
    policy = build_policy(config)
    for sampler in (config.explore.sampler, config.evaluation.sampler):
        sampler_grid(
            policy.path, sampler.name, sampler.steps, sampler.eta
        )  # refuses samplers that do not fit the model
    prompts = build_prompts(config, policy, console)
    # Everything that may be missing is looked for before the import, which can take hours.
    negatives = build_negatives(config)
    rewards = load_rewards(config.rewards, resolve, policy.device)
    judges = load_rewards(config.evaluation.judges, resolve, policy.device)
    named_prompts(config.evaluation.prompts, "evaluation.prompts")
    store = Store(run_dir / "store")
    if config.offline.source is not None:
        import_pairs(config, policy, store, console, stop, world)
    embeddings = PromptEmbeddings(policy, [""])
    metrics = MetricsWriter(run_dir / "metrics.jsonl", active=world.rank == 0)
    algorithm = ALGORITHMS[config.algorithm.type](config.algorithm, embeddings.select([""]))
    engine = make_engine(config, policy, algorithm, metrics, world, console)
    return Loop(
        config=config,
        run_dir=run_dir,
        policy=policy,
        engine=engine,
        store=store,
        prompts=prompts,
        negatives=negatives,
        embeddings=embeddings,
        score=lambda images, texts: score_images(rewards, images, texts),
        ranking=build_ranking(config),
        world=world,
        metrics=metrics,
        console=console,
        check_signals=stop.check,
        evaluate=make_evaluator(judges, rewards),
        initial=policy.weights.state("current"),
    )


def make_engine(
    config: RunConfig,
    policy: Policy,
    algorithm: Algorithm,
    metrics: MetricsWriter,
    world: World,
    console: Console,
) -> Engine:
    """The engine, told what the loss must be while policy and reference agree (ln 2 for a sigmoid of a zero logit)."""
    plain = (
        config.algorithm.kind == "sigmoid"
        and config.algorithm.alpha == 0
        and config.algorithm.sft_weight == 0
    )
    known = plain and config.algorithm.uncertainty == "off"
    initial_loss = math.log(2.0) if known else None
    return Engine(
        policy,
        algorithm,
        config.training,
        metrics,
        world=world,
        initial_loss=initial_loss,
        warn=console.warning,
    )


def build_policy(config: RunConfig) -> Policy:
    """The base model with trainable weights on it."""
    return load_policy(
        config.model,
        config.tuning,
        folder_or_id=resolve(config.model.path),
        seed=config.seed,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )


def build_prompts(config: RunConfig, policy: Policy, console: Console) -> list[Prompt]:
    """Training prompts, without those that are too long for the encoder (counted)."""
    prompts = named_prompts(config.prompts.source, "prompts.source")
    limit = config.prompts.max_tokens or policy.max_tokens
    kept, dropped = filter_long(prompts, policy.count_tokens, min(limit, policy.max_tokens))
    if dropped:
        console.warning(f"prompts: {len(dropped)} of {len(prompts)} exceed {limit} tokens and are left out")
    return kept


def build_negatives(config: RunConfig) -> list[str]:
    """Negative prompts, or none."""
    source = config.explore.negatives.source
    if source is None:
        return []
    return [prompt.text for prompt in load_prompts(resolve(source), "explore.negatives.source")]


def build_ranking(config: RunConfig) -> Ranking:
    """How the train rewards become one order."""
    train = {reward.name: reward.weight for reward in config.rewards if reward.role == "train"}
    kind = config.mixture.kind

    def only(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: scores[name] for name in train}

    return Ranking(
        judge="+".join(train) if len(train) == 1 else f"{kind}({'+'.join(train)})",
        mix=lambda scores: mix_rewards(only(scores), train, kind),
        check=lambda scores: check_rewards(only(scores)),
        dominance=(lambda scores: dominance(only(scores), train)) if kind == "pareto" else None,
        uncertainty=(lambda scores: uncertainty(only(scores)))
        if config.algorithm.uncertainty != "off"
        else None,
    )


def import_pairs(
    config: RunConfig, policy: Policy, store: Store, console: Console, stop: StopSignal, world: World
) -> None:
    """D_off into the store as iteration 0, each image encoded once."""
    if store.is_complete("offline", 0):
        return
    if world.rank == 0:
        with console.phase("import offline pairs", 0, "units of 256") as bar:

            def tick() -> None:
                bar.advance(1)
                stop.check()

            report = import_offline(
                resolve(str(config.offline.source)),
                policy,
                store,
                limit=config.offline.limit,
                seed=config.seed,
                accepts_prompt=lambda text: policy.count_tokens([text])[0] <= policy.max_tokens,
                tick=tick,
            )
        console.line(report.describe())
    world.barrier()


def describe_policy(policy: Policy) -> str:
    """One phrase: path, latent shape, trained parameters."""
    trained = sum(parameter.numel() for parameter in policy.weights.trainable().values())
    shape = "x".join(str(side) for side in policy.latent_shape)
    return f"{policy.path.kind}, latents {shape}, {trained:,} trained parameters, {policy.device}"
