"""Collecting: agents draw images for an iteration's requests, rewards score them, the store remembers them.

The work is cut into *units*: one agent, one image size, one batch of (request, image index) couples. A unit
is drawn in one batch, written as one shard and skipped when it exists, so a killed run loses at most the unit
that is drawn and the one that is scored, units can be spread over processes, and an image can be drawn again
bit for bit: its noise is keyed by its name and its row remembers the batch it was drawn in.

While a unit is drawn the one before it is scored, in a thread of its own: a scorer that waits (for a server,
for people) costs no time as long as drawing takes longer. Units are scored one at a time and in order, so
nothing depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.data.latents import PromptEmbeddings, host_array, image_sizes, latent_shapes
from diffexpo.data.rows import Sample
from diffexpo.data.store import Store
from diffexpo.diffusion.sampling import NoiseSource, sample
from diffexpo.errors import StoreError
from diffexpo.online.agents import Agent
from diffexpo.online.explore import Request
from diffexpo.rng import torch_generator
from diffexpo.training.background import Background
from diffexpo.types import Conditioning, Drawn, Policy

Score = Callable[[Drawn, Sequence[str]], Mapping[str, np.ndarray]]
"""What was drawn and its prompts to scores (B,) by reward."""
Tick = Callable[[], None]
Draw = Callable[["Drawing", "Unit", Tick], Tensor]
Key = Sequence[str | int]
# In a row's sampler settings, of images drawn with merged adapters only.
MERGED = "merged"


@dataclass(frozen=True)
class Item:
    """One image to draw: the request, its place in the iteration, and which of the agent's images it is."""

    request: Request
    group: int
    index: int


@dataclass(frozen=True)
class Unit:
    """One batch of one agent; its images have one size."""

    number: int
    agent: Agent
    items: tuple[Item, ...]

    @property
    def bucket(self) -> int:
        """Number of the size among those of the policy."""
        return self.items[0].request.bucket

    @property
    def prompts(self) -> list[str]:
        """The plain prompts of its images, which rewards score them against."""
        return [item.request.prompt.text for item in self.items]

    @property
    def negatives(self) -> list[str | None]:
        """The negative prompts of its images; None where there is none, or the agent uses none."""
        return [item.request.negative if self.agent.uses_negatives else None for item in self.items]


@dataclass(frozen=True)
class Drawing:
    """What stays the same while one iteration is collected. `merged` draws with adapters folded into the
    weights."""

    policy: Policy
    embeddings: PromptEmbeddings
    score: Score
    sampler: SamplerConfig
    append_negatives: bool
    seed: int
    iteration: int
    model: str
    merged: bool = False


def make_units(agents: Sequence[Agent], requests: Sequence[Request], batch_size: int) -> list[Unit]:
    """Cut the iteration into units of at most `batch_size` images, agent by agent and size by size;
    independent of the number of processes.
    """
    units: list[Unit] = []
    for agent in agents:
        items = [
            Item(request, group, index)
            for group, request in enumerate(requests)
            for index in range(agent.num_images)
        ]
        items.sort(key=lambda item: item.request.bucket)
        for _, same in groupby(items, key=lambda item: item.request.bucket):
            of_one_size = tuple(same)
            for start in range(0, len(of_one_size), batch_size):
                units.append(Unit(len(units), agent, of_one_size[start : start + batch_size]))
    return units


def latents_of_unit(drawing: Drawing, unit: Unit, tick: Tick) -> Tensor:
    """Latents (B,C,h,w) of one unit, drawn with its agent's weights."""
    with drawing.policy.weights.use(unit.agent.version, merged=drawing.merged):
        conditioning, negative, noise = unit_inputs(drawing, unit)
        return sample(drawing.policy, conditioning, negative, drawing.sampler, noise, tick=tick)


def collect(
    drawing: Drawing,
    units: Sequence[Unit],
    store: Store,
    *,
    rank: int,
    size: int,
    tick: Tick,
    draw: Draw = latents_of_unit,
    overlap: bool = True,
) -> None:
    """Draw, score and store this process's units that are not in the store yet.

    Args:
        units: All units of the iteration; this process takes every `size`-th from `rank`.
        tick: Called after each network call and each unit.
        draw: Gives the latents of a unit, and may keep more of them than the store does.
        overlap: Score a unit while the next is drawn; changes time only.
    """
    waiting: list[tuple[Unit, Tensor, tuple[int, int], Background[Mapping[str, np.ndarray]]]] = []

    def score_in_turn(drawn: Drawn, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """For a `draw` that scores too: scorers are called one at a time, in the order of the units."""
        for *_, scoring in waiting:
            scoring.wait()
        return drawing.score(drawn, prompts)

    def keep() -> None:
        while waiting:
            unit, latents, shape, scoring = waiting.pop()
            rows = rows_of_unit(drawing, unit, scoring.result(), shape)
            store.append_unit(drawing.iteration, rank, unit.number, rows, host_array(latents))

    in_turn = replace(drawing, score=score_in_turn)
    try:
        for unit in units[rank::size]:
            if store.unit_done(drawing.iteration, unit.number):
                for _ in range(drawing.sampler.steps + 1):
                    tick()
                continue
            latents = draw(in_turn, unit, tick)
            images = drawing.policy.decode_latents(latents)
            keep()
            score = partial(drawing.score, Drawn(latents, images), unit.prompts)
            scoring = Background(score, name="scoring", in_background=overlap)
            waiting.append((unit, latents, (images.shape[-2], images.shape[-1]), scoring))
            if not overlap:
                keep()
            tick()
        keep()
    except BaseException:
        # The unit that is being scored is paid for. What stopped us is the news, not what becomes of that
        # unit.
        with suppress(Exception):
            keep()
        raise


def rows_of_unit(
    drawing: Drawing, unit: Unit, scores: Mapping[str, np.ndarray], size: tuple[int, int]
) -> list[Sample]:
    """The samples of one unit, whose images have a size (height, width)."""
    settings = drawing.sampler.model_dump() | {"append_negatives": drawing.append_negatives}
    if drawing.merged:
        settings[MERGED] = True
    agent, parts = unit.agent, (unit.items, unit.negatives, noise_keys(drawing, unit))
    return [
        Sample(
            sample_id=f"{drawing.iteration:04d}-{item.group:06d}-{agent.name}-{item.index:02d}",
            iteration=drawing.iteration,
            unit=unit.number,
            group=item.group,
            prompt_id=item.request.prompt.id,
            prompt=item.request.prompt.text,
            negative_prompt=negative,
            agent=agent.name,
            weights=agent.fingerprint,
            seed_key=json.dumps(key),
            batch_size=len(unit.items),
            batch_position=position,
            sampler=json.dumps(settings, sort_keys=True),
            rewards=scores_at(scores, position),
            model=drawing.model,
            source="online",
            height=size[0],
            width=size[1],
        )
        for position, (item, negative, key) in enumerate(zip(*parts, strict=True))
    ]


def scores_at(scores: Mapping[str, np.ndarray], position: int) -> dict[str, float]:
    """One image's score by reward."""
    return {name: float(values[position]) for name, values in scores.items()}


def noise_keys(drawing: Drawing, unit: Unit) -> list[Key]:
    """What names the noise of each image of a unit."""
    first = (drawing.seed, drawing.iteration, "collect", unit.agent.name)
    return [(*first, item.request.prompt.id, item.group, item.index) for item in unit.items]


def unit_inputs(drawing: Drawing, unit: Unit) -> tuple[Conditioning, Conditioning | None, NoiseSource]:
    """Conditioning, the other side of guidance and noise of a unit."""
    both = zip(unit.prompts, unit.negatives, strict=True)
    texts, others = zip(*(texts_of(*one, drawing.append_negatives) for one in both), strict=True)
    conditioning = drawing.embeddings.select(texts)
    negative = guidance_of(drawing.embeddings, drawing.sampler, others)
    return conditioning, negative, noise_of(drawing.policy, noise_keys(drawing, unit), unit.bucket)


def texts_of(prompt: str, negative: str | None, appended: bool) -> tuple[str, str]:
    """(text, text on the other side of guidance) of a prompt and its negative prompt."""
    if not appended:
        return prompt, negative or ""
    return (f"{prompt}, {negative}" if negative else prompt), ""


def was_merged(sample: Sample) -> bool:
    """Whether a sample was drawn with adapters folded into the weights, and has to be drawn again so."""
    return bool(sample.sampler_settings.get(MERGED, False))


def texts_of_row(sample: Sample) -> tuple[str, str]:
    """`texts_of` a stored sample."""
    appended = bool(sample.sampler_settings["append_negatives"])
    return texts_of(sample.prompt, sample.negative_prompt, appended)


def noise_of(policy: Policy, keys: Sequence[Key], bucket: int = 0) -> NoiseSource:
    """Noise of a batch of one of the policy's sizes; row i's comes from the generator named keys[i]."""
    return NoiseSource([torch_generator(*key) for key in keys], latent_shapes(policy)[bucket])


def guidance_of(
    embeddings: PromptEmbeddings, sampler: SamplerConfig, negatives: Sequence[str]
) -> Conditioning | None:
    """The other side of guidance; None where none acts."""
    return embeddings.select(negatives) if sampler.guidance != 1.0 else None


def draw_latents(
    policy: Policy,
    embeddings: PromptEmbeddings,
    sampler: SamplerConfig,
    keys: Sequence[Key],
    texts: Sequence[str],
    negatives: Sequence[str],
    tick: Tick,
    bucket: int = 0,
) -> Tensor:
    """Latents of one batch of one size under the version in use; row i's noise comes from the generator named
    keys[i]."""
    negative = guidance_of(embeddings, sampler, negatives)
    noise = noise_of(policy, keys, bucket)
    return sample(policy, embeddings.select(texts), negative, sampler, noise, tick=tick)


def redraw(policy: Policy, embeddings: PromptEmbeddings, stored: Sample, tick: Tick) -> Tensor:
    """Draw one stored sample again, (1,C,h,w), with the version in use; equal bit for bit to what was stored.

    The batch is filled to its old size and the sample stands at its old position, because a kernel's rounding
    belongs to the batch's shape; what the other rows hold does not matter.

    Raises:
        StoreError: the row was not drawn by a sampler (offline data and human uploads cannot be drawn again).
    """
    if not stored.seed_key or not stored.sampler:
        raise StoreError(
            f"sample {stored.sample_id} has no seed: it was imported, not drawn, and cannot be regenerated"
        )
    size, position = stored.place
    settings = stored.sampler_settings
    settings.pop("append_negatives")
    settings.pop(MERGED, None)
    text, negative = texts_of_row(stored)
    latents = draw_latents(
        policy,
        embeddings,
        SamplerConfig(**settings),
        [stored.noise_key] * size,
        [text] * size,
        [negative] * size,
        tick,
        bucket_of_row(policy, stored),
    )
    return latents[position : position + 1]


def bucket_of_row(policy: Policy, stored: Sample) -> int:
    """Number of the size of a stored sample's image among those of the policy; a StoreError if it has no
    such size."""
    if len(latent_shapes(policy)) == 1:
        return 0
    size, sizes = (stored.height, stored.width), image_sizes(policy)
    if size not in sizes:
        raise StoreError(
            f"sample {stored.sample_id} has an image of {size[0]} x {size[1]} pixels, which is none of the "
            f"model's sizes {[list(known) for known in sizes]}; expected model.resolution and model.buckets "
            "as they were"
        )
    return sizes.index(size)


def texts_needed(requests: Sequence[Request], append_negatives: bool) -> list[str]:
    """Every text whose embedding an iteration needs, the empty prompt first."""
    texts = [""]
    for request in requests:
        prompt = request.prompt.text
        texts += [prompt, *texts_of(prompt, request.negative, append_negatives)]
    return list(dict.fromkeys(texts))


def group_rows(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Candidates of each request in a fixed order (by group, then sample id), whatever order shards were
    written in."""
    ordered = sorted(samples, key=lambda sample: (sample.group or 0, sample.sample_id))
    return [list(same) for _, same in groupby(ordered, key=lambda sample: sample.group or 0)]
