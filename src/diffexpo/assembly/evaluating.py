"""Evaluating iterates within a run: which version, which judges, where the result goes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexpo.assembly.aliases import named_prompts
from diffexpo.config import RunConfig
from diffexpo.config.contenders import start_contender
from diffexpo.config.rules import VALIDATED_APART
from diffexpo.config.schema import EvaluationConfig
from diffexpo.errors import ConfigError, ResumeError, RewardError
from diffexpo.estimate.method import evaluation_batch
from diffexpo.evaluation import records
from diffexpo.evaluation.divergence import kl_estimator
from diffexpo.evaluation.records import PairExample, SuiteResult
from diffexpo.evaluation.suites import Embedder, Evaluation, choose_prompts, describe_scorer
from diffexpo.evaluation.summary import alarms_of_training
from diffexpo.online import keeping
from diffexpo.online.loop import Loop, Stage, is_complete, load_iterate, ticking
from diffexpo.online.stages.train import train
from diffexpo.rewards.cache import cached
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.scoring import reads_latents
from diffexpo.training.metrics import peak_memory, read_metrics
from diffexpo.types import Prompt, Scorer


def make_evaluator(judges: Sequence[Scorer], rewards: Sequence[Scorer]) -> Callable[[Loop, str, int], None]:
    """A function (loop, name, iteration) that evaluates an iterate under a name, unless that is done."""
    # A score that compares images of a prompt says nothing of the one image that an evaluation draws.
    rewards = [reward for reward in rewards if not getattr(reward, "is_groupwise", False)]
    embedder, scorers = vendi_embedder(judges), [*judges, *rewards]

    def evaluate(loop: Loop, name: str, iteration: int) -> None:
        folder = eval_dir(loop) / name
        # Rank 0's answer is everybody's: see `online.loop.is_complete`.
        if loop.world.broadcast_object(records.is_saved(folder)):
            check_same_judges(lambda: records.load_suite(folder).scorers, scorers, str(folder))
        else:
            settings, result = loop.config.evaluation, as_before(loop, name, iteration)
            if result is None:
                ticks = evaluation_ticks(loop.config, iteration, loop.world.size)
                with ticking(loop, f"evaluate {name}", ticks, "batches") as tick:
                    result = draw_suite(
                        loop, settings, name, iteration, tick, judges, rewards, embedder, folder=folder
                    )
            if iteration == 0:
                check_judges(result)
            if loop.world.rank == 0:
                # The suite makes it complete, so the line comes first.
                tell(loop, result, iteration, scorers)
                records.save_suite(result, folder)
        loop.world.barrier()

    return evaluate


def make_validator(judges: Sequence[Scorer]) -> Callable[[Loop, int], None]:
    """A function (loop, iteration) that scores an iterate on the validation prompts, unless that is done. The
    manifest has the mean under the first judge, which `online.keeping` reads, and every score."""

    def validate(loop: Loop, iteration: int) -> None:
        store, name = loop.store, f"{keeping.STAGE} {iteration}"
        if is_complete(loop, keeping.STAGE, iteration):
            check_same_judges(lambda: store.manifest(keeping.STAGE, iteration)["scorers"], judges, name)
        else:
            settings = validation_settings(loop.config)
            ticks = images_ticks(loop.config, settings, loop.world.size)
            with ticking(loop, name, ticks, "batches") as tick:
                result = draw_suite(loop, settings, name, iteration, tick, judges)
            if loop.world.rank == 0:
                _keep_validation(loop, result, iteration, judges)
        loop.world.barrier()

    return validate


def _keep_validation(loop: Loop, result: SuiteResult, iteration: int, judges: Sequence[Scorer]) -> None:
    """Write what validation found; the manifest, written last, makes it complete."""
    means = {judge.name: finite_mean(result.scores[judge.name]) for judge in judges}
    payload = {f"validation/{judge}/mean": mean for judge, mean in means.items()}
    payload |= {
        "cost/network_evaluations": float(result.network_evaluations),
        "time/validate_s": result.seconds,
        **peak_memory(),
    }
    loop.metrics.write_once(iteration, keeping.STAGE, payload)
    first = judges[0].name
    if not math.isfinite(means[first]):
        raise RewardError(
            f"explore.validation.judges.0 ({first}) scored none of {len(result.prompt_index)} images of "
            f"iteration {iteration}, so it cannot say which iterate to keep; see log.txt"
        )
    told = ", ".join(f"{judge} {mean:.3f}" for judge, mean in means.items())
    loop.console.line(f"{keeping.STAGE} {iteration}: {told}")
    kept: dict[str, object] = {keeping.MEAN: means[first], "judge": first, "scorers": result.scorers}
    kept["prompts"] = result.prompt_ids()
    kept["scores"] = {judge: scores.tolist() for judge, scores in result.scores.items()}
    loop.store.write_manifest(keeping.STAGE, iteration, kept)


def validation_settings(config: RunConfig) -> EvaluationConfig:
    """An evaluation's settings on the validation prompts: its sampler, scores alone."""
    validation, names = config.explore.validation, ("prompts", "num_prompts", "images_per_prompt")
    own = {name: getattr(validation, name) for name in names}
    return config.evaluation.model_copy(update=own | {"kl_prompts": 0, "vendi_prompts": 0})


# Many parameters because each is an independent choice of the caller.
def draw_suite(
    loop: Loop,
    settings: EvaluationConfig,
    name: str,
    iteration: int,
    tick: Callable[[], None],
    judges: Sequence[Scorer],
    rewards: Sequence[Scorer] = (),
    embedder: Embedder | None = None,
    folder: Path | None = None,
) -> SuiteResult:
    """Draw and judge an iterate (0: the base) on the prompts of an evaluation's settings, all processes
    together; with a folder the first one has all images."""
    config = loop.config
    named = named_prompts(settings.prompts, "prompts")
    prompts = choose_prompts(named, settings.num_prompts, config.seed)
    loop.embeddings.add(["", *(prompt.text for prompt in prompts)])
    evaluation = Evaluation(
        policy=loop.policy,
        prompts=prompts,
        settings=settings,
        judges=judges,
        seed=config.seed,
        train_rewards=rewards,
        watched=[reward.name for reward in config.rewards if reward.role == "watch"],
        embedder=embedder,
        batch_size=evaluation_batch(config),
        encode=loop.embeddings.select,
        overlap=config.explore.overlap_scoring,
        world=loop.world,
        folder=folder,
    )
    if iteration > 0:
        load_iterate(loop, iteration, "current")
    return evaluation.run("base" if iteration == 0 else "current", tick, name=name)


def as_before(loop: Loop, name: str, iteration: int) -> SuiteResult | None:
    """The evaluation of an iterate that no update has changed, from that of the one before it; None where
    there is none, and the iterate has to be drawn."""
    start = start_contender(loop.config) if iteration == 1 else None
    is_start_apart = iteration == 1 and loop.config.tuning.start is not None and start is None
    if iteration == 0 or loop.lane or is_start_apart:
        return None
    if loop.store.manifest("train", iteration).get("cost/network_evaluations"):
        return None
    before = eval_dir(loop) / ("base" if iteration == 1 else f"iteration-{iteration - 1}")
    if start is not None:
        before = loop.run_dir / records.CONTENDERS / "eval" / start
    if not records.is_saved(before):
        return None
    suite, settings = records.load_suite(before), loop.config.evaluation
    count = min(settings.kl_prompts, len(suite.prompts))
    kl = suite.kl if iteration > 1 or start is not None else [0.0] * count
    estimator = kl_estimator(loop.policy.path, settings.sampler) if kl else ""
    return replace(suite, version=name, kl=kl, kl_estimator=estimator, seconds=0.0, network_evaluations=0)


def check_judges(result: SuiteResult) -> None:
    """Refuse, with a RewardError, held-out judges that could score no image of the base: they would say
    nothing of the run either."""
    for name, values in result.scores.items():
        if result.roles[name] == "heldout" and not np.isfinite(values).any():
            raise RewardError(
                f"judge {name!r} (evaluation.judges): none of {len(values)} images of the base got a finite "
                f"score, the first for the prompt {result.prompts[0].text!r}; the warnings above say why. "
                "Choose a judge that reads evaluation.prompts, or other prompts, and start a new run"
            )


def tell(loop: Loop, result: SuiteResult, iteration: int, scorers: Sequence[Scorer]) -> None:
    """An evaluation's mean scores, in the metrics and on the console, and what caches had of them."""
    means = {name: finite_mean(values[result.scored]) for name, values in result.scores.items()}
    line = {f"eval/{name}/mean": mean for name, mean in means.items()}
    for scorer in cached(scorers):
        line[f"reward_cache/{scorer.name}/hits"] = float(scorer.num_hits)
        line[f"reward_cache/{scorer.name}/misses"] = float(scorer.num_misses)
    line |= {"time/evaluate_s": result.seconds} | peak_memory()
    loop.metrics.write_once(iteration, "evaluate", line)
    told = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    loop.console.line(f"{result.version}: {told}")
    for scorer in cached(scorers):
        counts = f"{scorer.num_hits} scores from its cache so far, {scorer.num_misses} asked for"
        loop.console.line(f"{scorer.name}: {counts}")


def check_same_judges(known: Callable[[], Mapping[str, str]], scorers: Sequence[Scorer], scored: str) -> None:
    """Refuse, with a ResumeError, to continue with a judge that was trained again since the run began.

    `known` gives the scorers, as `describe_scorer` does, that `scored` was scored with.
    """
    of_latents = [scorer for scorer in scorers if reads_latents(scorer)]
    before = known() if of_latents else {}
    for scorer in of_latents:
        now = describe_scorer(scorer)
        if before.get(scorer.name, now) != now:
            raise ResumeError(
                f"reward {scorer.name!r} is no longer the judge that {scored} was scored with: its weights "
                "or settings changed; restore the model it names, or start a new run"
            )


def on_training(loop: Loop, iteration: int) -> None:
    """Train p_t, and say at once what is alarming about it, before any of its images is drawn."""
    is_new = loop.world.rank == 0 and not loop.store.is_complete(loop.lane + "train", iteration)
    train(loop, iteration)
    metrics = read_metrics(loop.metrics.path) if is_new else []
    found = alarms_of_training(metrics, iteration, shlex.quote(str(loop.run_dir))) if is_new else []
    for alarm in found:
        loop.console.warning(f"iteration {iteration}: {alarm.message} {alarm.what_to_do}")


def on_iterate(loop: Loop, iteration: int) -> None:
    """Evaluate p_t when the configuration asks for every one; else the last one, where that is the result."""
    explore, every = loop.config.explore, loop.config.evaluation.every_iteration
    if every or (explore.keep == "last" and iteration == explore.iterations):
        loop.evaluate(loop, loop.lane.removesuffix("_") or f"iteration-{iteration}", iteration)


def on_validation(loop: Loop, iteration: int) -> None:
    """Validate p_t."""
    assert loop.validate is not None  # built where `keep: best` asks for the stage
    loop.validate(loop, iteration)


EVALUATING: dict[str, Stage] = {
    "train": on_training,
    keeping.STAGE: on_validation,
    "evaluate": on_iterate,
}
"""Stages of a run that judge what it has trained."""


def separate_prompts(config: RunConfig, trained: Sequence[Prompt]) -> None:
    """Look for the validation prompts, if any are named, and refuse, with a ConfigError, those that are also
    evaluated or trained on."""
    source = config.explore.validation.prompts
    if source is None:
        return
    texts = {prompt.text for prompt in named_prompts(source, "explore.validation.prompts")}
    evaluated = named_prompts(config.evaluation.prompts, "evaluation.prompts")
    for key, others in (("evaluation.prompts", evaluated), ("prompts.source", trained)):
        shared = sorted(texts & {prompt.text for prompt in others})
        if shared:
            raise ConfigError(
                f"explore.validation.prompts = {source}: {len(shared)} of its {len(texts)} prompts are also "
                f"in {key}, such as {shared[0]!r}: {VALIDATED_APART[key]}"
            )


def eval_dir(loop: Loop) -> Path:
    """Lanes are evaluated beside their folder: that of the baseline in the run's own eval folder."""
    return (loop.run_dir.parent if loop.lane else loop.run_dir) / "eval"


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def evaluation_ticks(config: RunConfig, iteration: int, processes: int = 1) -> int:
    """Ticks of the first process in an evaluation: network calls and scored batches of images, and network
    calls of KL paths."""
    settings = config.evaluation
    paths = 0 if iteration == 0 else -(-settings.kl_prompts // evaluation_batch(config))
    return images_ticks(config, settings, processes) + -(-paths // processes) * settings.sampler.steps


def images_ticks(config: RunConfig, settings: EvaluationConfig, processes: int = 1) -> int:
    """Network calls and scored batches of an evaluation's images, of which the first process takes its
    share."""
    plain = settings.num_prompts * settings.images_per_prompt
    extra = settings.vendi_prompts * max(settings.vendi_images - settings.images_per_prompt, 0)
    batches = -(-(plain + extra) // evaluation_batch(config))
    return -(-batches // processes) * (settings.sampler.steps + 1)


def vendi_embedder(judges: Sequence[Scorer]) -> Embedder:
    """Features for the Vendi score: those of the first judge with an image encoder, else 32x32 pixels."""
    for judge in judges:
        if getattr(judge, "has_image_features", False) and (embed := getattr(judge, "embed_images", None)):
            return Embedder(embed, f"{judge.name} image features")
    return Embedder(pixel_features, "32x32 pixels")


def pixel_features(images: Tensor) -> Tensor:
    """Images (B,3,H,W) as centred pixel vectors (B, 3072)."""
    small = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    return (small - small.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)


def save_examples(loop: Loop) -> None:
    """Images of a few pairs of each iteration for the report, chosen by rule."""
    for iteration in (number for stage, number in loop.store.completed() if stage == "pair"):
        examples = []
        for rule, pair in records.choose_pair_examples(loop.store.pairs(iteration)):
            sides = {"winner": pair.winner_id, "loser": pair.loser_id}
            latents = torch.from_numpy(loop.store.latents(list(sides.values())))
            images = to_bytes(loop.policy.decode_latents(latents))
            told: dict[str, Any] = {}
            for side, name in sides.items():
                sample = loop.store.sample(name)
                told[f"{side}_agent"], told[f"{side}_scores"] = sample.agent, sample.rewards or {}
                told[f"{side}_negative"] = sample.negative_prompt or ""
            example = PairExample(pair.pair_id, iteration, pair.prompt, rule, pair.margin, **told)
            examples.append((example, images[0], images[1]))
        records.save_pair_examples(loop.run_dir, iteration, examples)
