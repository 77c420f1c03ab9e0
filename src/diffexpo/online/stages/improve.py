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
from pathlib import Path

import torch
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.config.schema import ImproverConfig, SamplerConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.pairs import PairLoader, pair_index
from diffexpo.data.rows import Sample
from diffexpo.diffusion.guidance import DoubleGuidance
from diffexpo.diffusion.sampling import sample_double_guided
from diffexpo.errors import ResumeError
from diffexpo.online.improved_pairs import (
    IMPROVER,
    Improving,
    couples,
    distance_warning,
    gain_metrics,
    relative_distance,
)
from diffexpo.online.loop import Loop, ticking
from diffexpo.online.units import Tick, group_rows, noise_of
from diffexpo.training.checkpoint import read_tensors, write_tensors
from diffexpo.types import Drawn, Policy

MEASURED_PAIRS = 256


def train_improver(loop: Loop, iteration: int = 0) -> None:
    """Train the improvement model on D_off, or take over the one that was given; continues at its last
    checkpoint."""
    if loop.store.is_complete("improver", iteration):
        return
    settings, improving = improver_settings(loop.config), _improving(loop)
    payload: dict[str, float] = {}
    began = time.monotonic()
    checkpoints = loop.run_dir / "checkpoints" / "improver"
    if settings.path is None:
        loader = _offline_loader(loop, iteration)
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
            loop.console.line(
                "improvement model: "
                + ", ".join(
                    f"{name.removeprefix('improver/error_')} error {value:.4f}"
                    for name, value in payload.items()
                    if name.startswith("improver/error_")
                )
                + f"; saved {loop.run_dir / 'improver'}"
            )
    loop.world.barrier()


def load_improver(loop: Loop) -> str:
    """Put the trained weights into the improvement model; returns their fingerprint.

    Raises:
        ResumeError: the file is gone or does not hold what was trained.
    """
    weights, path = _improving(loop).policy.weights, weights_path(loop.run_dir)
    expected = str(loop.store.manifest("improver", 0)["weights"])
    if weights.fingerprint("current") == expected:
        return expected
    if not path.exists():
        raise ResumeError(
            f"{path} is missing although the improvement model is trained; restore it or start a new run"
        )
    weights.load("current", read_tensors(path))
    if weights.fingerprint("current") != expected:
        raise ResumeError(
            f"{path} does not hold the weights that were trained; restore it or start a new run"
        )
    return expected


def weights_path(run_dir: Path) -> Path:
    """Where a run keeps its improvement model's weights."""
    return run_dir / "checkpoints" / "improver.safetensors"


def improve(loop: Loop, iteration: int) -> None:
    """Draw a winner for every image that the iteration collected; the manifest, written last, makes the stage
    complete."""
    store = loop.store
    if store.is_complete("improve", iteration):
        return
    fingerprint = load_improver(loop)
    units = units_of(store.collected(iteration))
    sampler = improver_sampler(loop.config)
    share = len(units[loop.world.rank :: loop.world.size])
    if loop.world.rank == 0:
        store.discard_incomplete("improve", iteration)
    loop.world.barrier()
    began = time.monotonic()
    with ticking(loop, f"improve {iteration}", share * (sampler.steps + 1), "batches") as tick:
        for number, losers in units[loop.world.rank :: loop.world.size]:
            if store.unit_done(iteration, number, stage="improve"):
                for _ in range(sampler.steps + 1):
                    tick()
                continue
            rows, latents = _improve_unit(loop, losers, sampler, fingerprint, tick)
            store.append_unit(iteration, loop.world.rank, number, rows, latents, stage="improve")
            tick()
    loop.world.barrier()
    if loop.world.rank == 0:
        payload = measure(loop, iteration)
        payload["time/improve_s"] = time.monotonic() - began
        loop.metrics.write_once(iteration, "improve", payload)
        store.write_manifest("improve", iteration, payload)
    loop.world.barrier()


def improve_latents(
    improver: Policy,
    embeddings: PromptEmbeddings,
    sampler: SamplerConfig,
    scales: DoubleGuidance,
    keys: Sequence[Sequence[str | int]],
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

    The batch is filled to its old size, as in `collect.redraw`.
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


def units_of(samples: Sequence[Sample]) -> list[tuple[int, list[Sample]]]:
    """(unit, its samples in the order of the batch) by number: winners are drawn in the batches of their
    losers."""
    units: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.unit, sample.place)):
        units.setdefault(sample.unit, []).append(sample)
    return list(units.items())


def measure(loop: Loop, iteration: int) -> dict[str, float]:
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
    winner, loser = (
        torch.from_numpy(store.latents([sample.sample_id for sample in samples]))
        for samples in ([pair[1] for pair in chosen], [pair[2] for pair in chosen])
    )
    prompts = [winner.prompt for _, winner, _ in chosen]
    distance, relative = relative_distance(winner, loser, prompts)
    metrics |= {"improve/latent_distance": distance, "improve/relative_distance": relative}
    if improving.embed is not None:
        features = [_features(loop.policy, improving.embed, latents) for latents in (winner, loser)]
        metrics["improve/feature_cosine"] = float((features[0] * features[1]).sum(dim=1).mean())
        unrelated = features[1].roll(max(1, len(chosen) // 2), dims=0)
        metrics["improve/feature_cosine_unrelated"] = float((features[1] * unrelated).sum(dim=1).mean())
    warning = distance_warning(relative)
    if warning is not None:
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
    keys = [_noise_key(loop.config.seed, loser) for loser in losers]
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
            seed_key=json.dumps(list(key)),
            sampler=drawn_with,
            rewards={name: float(values[position]) for name, values in scores.items()},
            latent_file="",
            improved_from=loser.sample_id,
        )
        for position, (loser, key) in enumerate(zip(losers, keys, strict=True))
    ]
    return winners, latents


def _noise_key(seed: int, loser: Sample) -> tuple[str | int, ...]:
    return (seed, loser.iteration, "improve", loser.sample_id)


def _features(policy: Policy, embed: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    parts = [embed(policy.decode_latents(part)).double() for part in torch.split(latents, 64)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def _offline_loader(loop: Loop, iteration: int) -> PairLoader:
    """Batches of D_off, whatever has been collected since."""
    index = pair_index(loop.store, loop.config.hybrid, 1)
    loop.embeddings.add(["", *index.prompts()])
    return PairLoader(
        loop.store,
        index,
        loop.embeddings,
        batch_size=improver_settings(loop.config).batch_size,
        run_seed=loop.config.seed,
        iteration=iteration,
    )


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
