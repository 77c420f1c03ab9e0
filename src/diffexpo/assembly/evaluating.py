"""Evaluating iterates within a run: which version, which judges, where the result goes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffexpo.assembly.aliases import named_prompts
from diffexpo.config import RunConfig
from diffexpo.errors import ResumeError
from diffexpo.estimate.method import evaluation_batch
from diffexpo.evaluation import records
from diffexpo.evaluation.records import PairExample, SuiteResult
from diffexpo.evaluation.suites import Embedder, Evaluation, choose_prompts, describe_scorer
from diffexpo.online.loop import Loop, load_iterate, ticking
from diffexpo.rewards.cache import cached
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.scoring import reads_latents
from diffexpo.types import Scorer


def make_evaluator(judges: Sequence[Scorer], rewards: Sequence[Scorer]) -> Callable[[Loop, str, int], None]:
    """A function (loop, name, iteration) that evaluates an iterate under a name, unless that is done."""
    embedder, scorers = vendi_embedder(judges), [*judges, *rewards]

    def evaluate(loop: Loop, name: str, iteration: int) -> None:
        folder = eval_dir(loop) / name
        if records.is_saved(folder):
            check_same_judges(folder, scorers)
        elif loop.world.rank == 0:
            config = loop.config
            prompts = named_prompts(config.evaluation.prompts, "evaluation.prompts")
            evaluation = Evaluation(
                policy=loop.policy,
                prompts=choose_prompts(prompts, config.evaluation.num_prompts, config.seed),
                settings=config.evaluation,
                judges=judges,
                seed=config.seed,
                train_rewards=rewards,
                watched=[reward.name for reward in config.rewards if reward.role == "watch"],
                embedder=embedder,
                batch_size=evaluation_batch(config),
                encode=loop.embeddings.select,
                overlap=config.explore.overlap_scoring,
            )
            if iteration > 0:
                load_iterate(loop, iteration, "current")
            ticks = evaluation_ticks(config, name)
            with ticking(loop, f"evaluate {name}", ticks, "batches") as tick:
                result = evaluation.run("base" if iteration == 0 else "current", tick, name=name)
            records.save_suite(result, folder)
            tell(loop, result, iteration, scorers)
        loop.world.barrier()

    return evaluate


def tell(loop: Loop, result: SuiteResult, iteration: int, scorers: Sequence[Scorer]) -> None:
    """An evaluation's mean scores, in the metrics and on the console, and what caches had of them."""
    means = {name: finite_mean(values[result.scored]) for name, values in result.scores.items()}
    line = {f"eval/{name}/mean": mean for name, mean in means.items()}
    for scorer in cached(scorers):
        line[f"reward_cache/{scorer.name}/hits"] = float(scorer.num_hits)
        line[f"reward_cache/{scorer.name}/misses"] = float(scorer.num_misses)
    # The largest resident set of this process so far.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    line |= {"time/evaluate_s": result.seconds, "mem/peak_gib": peak}
    loop.metrics.write_once(iteration, "evaluate", line)
    told = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    loop.console.line(f"{result.version}: {told}")
    for scorer in cached(scorers):
        counts = f"{scorer.num_hits} scores from its cache so far, {scorer.num_misses} asked for"
        loop.console.line(f"{scorer.name}: {counts}")


def check_same_judges(folder: Path, scorers: Sequence[Scorer]) -> None:
    """Refuse, with a ResumeError, to continue with a judge that was trained again since the run began."""
    of_latents = [scorer for scorer in scorers if reads_latents(scorer)]
    before = records.load_suite(folder).scorers if of_latents else {}
    for scorer in of_latents:
        now = describe_scorer(scorer)
        if before.get(scorer.name, now) != now:
            raise ResumeError(
                f"reward {scorer.name!r} is no longer the judge that {folder} was scored with: its weights "
                "or settings changed; restore the model it names, or start a new run"
            )


def on_iterate(loop: Loop, iteration: int) -> None:
    """Evaluate p_t: always the last one, the others when the configuration asks for it."""
    if iteration == loop.config.explore.iterations or loop.config.evaluation.every_iteration:
        loop.evaluate(loop, "baseline" if loop.lane else f"iteration-{iteration}", iteration)


def eval_dir(loop: Loop) -> Path:
    """All lanes' evaluations lie in the run's one eval folder."""
    return (loop.run_dir.parent if loop.lane else loop.run_dir) / "eval"


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def evaluation_ticks(config: RunConfig, name: str) -> int:
    """Ticks of an evaluation: network calls and scored batches of images, and network calls of KL paths."""
    settings = config.evaluation
    plain = settings.num_prompts * settings.images_per_prompt
    extra = settings.vendi_prompts * max(settings.vendi_images - settings.images_per_prompt, 0)
    size = evaluation_batch(config)
    batches = -(-(plain + extra) // size)
    paths = 0 if name == "base" else -(-settings.kl_prompts // size)
    return batches * (settings.sampler.steps + 1) + paths * settings.sampler.steps


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
