"""The improvement model of a run: made or loaded, with an engine of its own that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from diffexpo.algorithms.improvement_dpo import Improvement
from diffexpo.assembly.aliases import resolve
from diffexpo.assembly.evaluating import vendi_embedder
from diffexpo.config import RunConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, MissingError
from diffexpo.online.improved_pairs import Improving
from diffexpo.online.loop import Console
from diffexpo.online.stages.improve import improver_settings, metrics_path, weights_path
from diffexpo.policies.improver import load_improver, make_improver, save_improver
from diffexpo.training.checkpoint import read_tensors
from diffexpo.training.distributed import World
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter
from diffexpo.types import Policy, Scorer


def build_improving(
    config: RunConfig,
    run_dir: Path,
    policy: Policy,
    empty: PromptEmbeddings,
    store: Store,
    judges: Sequence[Scorer],
    world: World,
    console: Console,
) -> Improving:
    """The improvement model and its engine; a given model may be missing (MissingError) or belong to other
    latents or texts (PolicyError)."""
    settings = improver_settings(config)
    own = ("steps", "batch_size", "micro_batch_size", "learning_rate", "ema_decay", "checkpoint_every")
    training = {name: getattr(settings, name) for name in own} | {"pair_gradient": "joint"}
    checkpointing = config.training.gradient_checkpointing
    # Once a run has taken a given model over, it has a copy of its own.
    is_given = settings.path is not None and not store.is_complete("improver", 0)
    if is_given:
        given = Path(resolve(str(settings.path)))
        improver = load_improver(given, policy, gradient_checkpointing=checkpointing)
    else:
        improver = make_improver(policy, gradient_checkpointing=checkpointing)
    engine = Engine(
        improver,
        Improvement(settings, empty.select([""])),
        config.training.model_copy(update=training),
        MetricsWriter(metrics_path(run_dir), active=world.rank == 0 and settings.path is None),
        world=world,
        warn=console.warning,
    )
    embed, _ = vendi_embedder(judges)
    return Improving(improver, engine, partial(save_improver, improver), embed)


def restore_improver(config: RunConfig, run_dir: Path, store: Store, policy: Policy) -> Policy:
    """The trained improvement model of a run; ConfigError if the run has another method, MissingError if it
    is not trained yet."""
    if config.algorithm.improvement is None:
        reason = f"algorithm.type = {config.algorithm.type} has no improvement model"
        raise ConfigError(f"{run_dir}: {reason}; expected a run of improvement_dpo")
    if not store.is_complete("improver", 0):
        advice = f"train it with `diffexpo improve train {run_dir}`"
        raise MissingError(f"{run_dir}: the improvement model is not trained yet; {advice}")
    improver = make_improver(policy)
    improver.weights.load("current", read_tensors(weights_path(run_dir)))
    return improver
