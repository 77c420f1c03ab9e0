r"""The stages of an improvement model: train it once, then draw a winner from every image that was collected.

    improver p_dagger = train on D_off, or given
    for t = 1 .. T:
        p_t = train(init p_{t-1}, reference, D_1 + ... + D_{t-1} and D_off by weight);   evaluate p_t
        if t < T:
            losers ~ p_t(c);   winners ~ p_dagger(loser, c);   D_t = their pairs

(Algorithm 1 of the paper.) Training, collecting and pairing are those of every method. Both stages continue
where they were stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.config.schema import ImproverConfig, SamplerConfig
from diffexpo.data.latents import PromptEmbeddings, host_array
from diffexpo.data.rows import Sample
from diffexpo.diffusion.guidance import DoubleGuidance
from diffexpo.diffusion.sampling import sample_double_guided
from diffexpo.online.improved_pairs import (
    IMPROVER,
    Improving,
    couples,
    distance_warning,
    gain_metrics,
    relative_distance,
)
from diffexpo.online.loaders import pair_loader
from diffexpo.online.loop import Loop, draw_stage, is_complete, load_trained, ticking
from diffexpo.online.units import Key, Tick, group_rows, noise_of, scores_at
from diffexpo.training.checkpoint import write_tensors
from diffexpo.types import Drawn, Policy

MEASURED_PAIRS = 256


def train_improver(loop: Loop, iteration: int = 0) -> None:
    """Train the improvement model on D_off, or take over the one that was given; continues at its last
    checkpoint."""
    if is_complete(loop, "improver", iteration):
        return
    settings, improving = improver_settings(loop.config), _improving(loop)
    payload: dict[str, float] = {}
    began = time.monotonic()
    checkpoints = loop.run_dir / "checkpoints" / "improver"
    if settings.path is None:
        # D_off, whatever has been collected since.
        loader = pair_loader(loop, iteration, 1, settings.batch_size)
        loop.console.line(f"improvement model: training on {loader.describe()}")
        total = settings.steps * improving.engine.micro_steps
        with ticking(loop, "train the improvement model", total, "micro-batches") as tick:
            report = improving.engine.train_iteration(
                iteration,
                loader,
                steps=settings.steps,
                checkpoint_dir=checkpoints,
                run_seed=loop.config.seed,
                tick=tick,
            )
        payload = {name.replace("train/", "improver/"): value for name, value in report.metrics().items()}
    if loop.world.rank == 0:
        weights = improving.policy.weights
        write_tensors(weights_path(loop.run_dir), weights.state("current"))
        improving.save(loop.run_dir / "improver")
        payload["cost/network_evaluations"] = loop.config.algorithm.stage_costs(loop.config, 0)["training"]
        payload["time/improver_s"] = time.monotonic() - began
        loop.metrics.write_once(iteration, "improver", payload)
        loop.store.write_manifest(
            "improver", iteration, {**payload, "weights": weights.fingerprint("current")}
        )
        shutil.rmtree(checkpoints, ignore_errors=True)
        if settings.path is None:
            errors = [
                f"{name.removeprefix('improver/error_')} error {value:.4f}"
                for name, value in payload.items()
                if name.startswith("improver/error_")
            ]
            folder = loop.run_dir / "improver"
            loop.console.line(f"improvement model: {', '.join(errors)}; saved {folder}")
    loop.world.barrier()


def load_improver(loop: Loop) -> str:
    """Put the trained weights into the improvement model, as `load_trained` does; returns their
    fingerprint."""
    weights, expected = _improving(loop).policy.weights, str(loop.store.manifest("improver", 0)["weights"])
    if weights.fingerprint("current") != expected:
        path, fact = weights_path(loop.run_dir), "the improvement model is trained"
        load_trained(loop, weights, "current", path, ("improver", 0), fact)
    return expected


def weights_path(run_dir: Path) -> Path:
    """Where a run keeps its improvement model's weights."""
    return run_dir / "checkpoints" / "improver.safetensors"


def improve(loop: Loop, iteration: int) -> None:
    """Draw a winner for every image that the iteration collected, in the batches of their losers."""
    if is_complete(loop, "improve", iteration):
        return
    fingerprint, sampler, world = load_improver(loop), improver_sampler(loop.config), loop.world
    ordered = sorted(loop.store.collected(iteration), key=lambda sample: (sample.unit, sample.place))
    units = [list(same) for _, same in groupby(ordered, key=lambda sample: sample.unit)]
    mine = units[world.rank :: world.size]

    def draw(tick: Tick) -> None:
        for losers in mine:
            number = losers[0].unit
            if loop.store.unit_done(iteration, number, stage="improve"):
                for _ in range(sampler.steps):
                    tick()
            else:
                rows, latents = _improve_unit(loop, losers, sampler, fingerprint, tick)
                arrays = host_array(latents)
                loop.store.append_unit(iteration, world.rank, number, rows, arrays, stage="improve")
            tick()

    ticks = len(mine) * (sampler.steps + 1)
    draw_stage(loop, "improve", iteration, ticks, draw, lambda: _measure(loop, iteration))


def improve_latents(
    improver: Policy,
    embeddings: PromptEmbeddings,
    sampler: SamplerConfig,
    scales: DoubleGuidance,
    keys: Sequence[Key],
    texts: Sequence[str],
    losers: Tensor,
    tick: Tick,
) -> Tensor:
    """Winners (B,C,h,w) for losers (B,C,h,w) and their prompts; row i's noise comes from the generator named
    keys[i]."""
    with improver.weights.use("current"):
        return sample_double_guided(
            improver,
            embeddings.select(texts),
            embeddings.select([""] * len(texts)),
            losers,
            sampler,
            noise_of(improver, keys),
            scales,
            tick=tick,
        )


def redraw_improved(
    improver: Policy, embeddings: PromptEmbeddings, winner: Sample, loser: Tensor, tick: Tick
) -> Tensor:
    """Draw one stored winner again, (1,C,h,w), from its loser's latents (1,C,h,w); equal bit for bit to what
    was stored.

    The batch is filled to its old size, as in `units.redraw`.
    """
    size, position = winner.place
    settings = winner.sampler_settings
    scales = DoubleGuidance(settings.pop("image_scale"), settings.pop("text_scale"))
    keys, texts = [winner.noise_key] * size, [winner.prompt] * size
    sampler, many = SamplerConfig(**settings), loser.expand(size, -1, -1, -1)
    latents = improve_latents(improver, embeddings, sampler, scales, keys, texts, many, tick)
    return latents[position : position + 1]


def improver_sampler(config: RunConfig) -> SamplerConfig:
    """How winners are drawn: as losers are, with the improver's number of steps; its guidance is the double
    one."""
    steps = improver_settings(config).sampler_steps or config.explore.sampler.steps
    return config.explore.sampler.model_copy(update={"guidance": 1.0, "steps": steps})


def double_guidance_of(config: RunConfig) -> DoubleGuidance:
    """The scales with which winners are drawn."""
    improver = improver_settings(config)
    return DoubleGuidance(improver.image_scale, improver.text_scale)


def _measure(loop: Loop, iteration: int) -> dict[str, float]:
    """What is to be known of an iteration's improved images: how far from their losers, and what rewards say
    of them."""
    store, improving = loop.store, _improving(loop)
    rows = store.collected(iteration) + store.collected(iteration, stage="improve")
    pairs = couples(group_rows(rows))
    metrics: dict[str, float] = {
        "improve/images": len(pairs),
        "cost/network_evaluations": loop.config.algorithm.stage_costs(loop.config, len(pairs))["drawing"],
        **gain_metrics(pairs),
    }
    # A spread of the whole iteration, not its front.
    chosen = pairs[:: max(1, len(pairs) // MEASURED_PAIRS)][:MEASURED_PAIRS]
    winner = torch.from_numpy(store.latents([winner.sample_id for _, winner, _ in chosen]))
    loser = torch.from_numpy(store.latents([loser.sample_id for _, _, loser in chosen]))
    distance, relative = relative_distance(winner, loser, [winner.prompt for _, winner, _ in chosen])
    metrics |= {"improve/latent_distance": distance, "improve/relative_distance": relative}
    if improving.embed is not None:
        improved, original = (_features(loop.policy, improving.embed, side) for side in (winner, loser))
        unrelated = original.roll(max(1, len(chosen) // 2), dims=0)
        metrics["improve/feature_cosine"] = float((improved * original).sum(dim=1).mean())
        metrics["improve/feature_cosine_unrelated"] = float((original * unrelated).sum(dim=1).mean())
    if (warning := distance_warning(relative)) is not None:
        loop.console.warning(f"iteration {iteration}: {warning}")
    gains = [
        f"{name.split('/')[2]} {value:+.3f}" for name, value in metrics.items() if name.endswith("/gain")
    ]
    loop.console.line(
        f"iteration {iteration}: {len(pairs)} images improved, relative distance {relative:.2f}"
        + (f", gain in {', '.join(gains)}" if gains else "")
    )
    return metrics


def _improve_unit(
    loop: Loop, losers: Sequence[Sample], sampler: SamplerConfig, fingerprint: str, tick: Tick
) -> tuple[list[Sample], Tensor]:
    """Winners and their latents (B,C,h,w) of one unit of losers."""
    scales = double_guidance_of(loop.config)
    keys = [(loop.config.seed, loser.iteration, "improve", loser.sample_id) for loser in losers]
    texts = [loser.prompt for loser in losers]
    images = torch.from_numpy(loop.store.latents([loser.sample_id for loser in losers]))
    improver = _improving(loop).policy
    latents = improve_latents(improver, loop.embeddings, sampler, scales, keys, texts, images, tick)
    scores = loop.score(Drawn(latents, loop.policy.decode_latents(latents)), texts)
    drawn_with = json.dumps(sampler.model_dump() | scales._asdict(), sort_keys=True)
    winners = [
        replace(
            loser,
            sample_id=f"{loser.sample_id}-improved",
            negative_prompt=None,
            agent=IMPROVER,
            weights=fingerprint,
            seed_key=json.dumps(key),
            sampler=drawn_with,
            rewards=scores_at(scores, position),
            latent_file="",
            improved_from=loser.sample_id,
        )
        for position, (loser, key) in enumerate(zip(losers, keys, strict=True))
    ]
    return winners, latents


def _features(policy: Policy, embed: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    parts = [embed(policy.decode_latents(part)).double() for part in torch.split(latents, 64)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def improver_settings(config: RunConfig) -> ImproverConfig:
    """The settings of the run's improvement model; these stages are those of methods that have one."""
    assert config.algorithm.improvement is not None
    return config.algorithm.improvement


def _improving(loop: Loop) -> Improving:
    assert loop.improving is not None  # the builder makes one for this method
    return loop.improving


def metrics_path(run_dir: Path) -> Path:
    """Where the steps of the improvement model's training are recorded."""
    return run_dir / "improver" / "metrics.jsonl"
