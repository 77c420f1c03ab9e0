"""Evaluate versions of a policy: the same prompts, the same keyed noise and the same judges for each.

The noise of an image comes from (run seed, "evaluate", prompt id, image index) and all versions share their
batches, so the images of two versions differ by the weights alone. Judges see what a person sees, the 8-bit
image; those that judge latents see the drawn ones. A batch is judged while the next is drawn; batches are
judged one at a time and in order, so no result depends on the overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffexpo.bounded.images import read_image
from diffexpo.config.schema import EvaluationConfig, SamplerConfig
from diffexpo.diffusion import NoiseSource, num_network_evaluations, sample
from diffexpo.errors import DataError
from diffexpo.evaluation.divergence import kl_estimator, path_kl
from diffexpo.evaluation.metrics import vendi_score
from diffexpo.evaluation.records import SuiteResult, image_path, save_images
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.scoring import Budget, score_drawn
from diffexpo.rng import keyed_order, torch_generator
from diffexpo.training.background import Background
from diffexpo.training.distributed import World
from diffexpo.types import Conditioning, Drawn, Policy, Prompt, Scorer

Tick = Callable[[], None]


class Embedder(NamedTuple):
    """Images (B,3,H,W) in [0,1] -> features (B,d) for the Vendi score, and what the report calls them."""

    features: Callable[[Tensor], Tensor]
    name: str


def describe_scorer(scorer: Scorer) -> str:
    """What a suite keeps of a scorer: its version and its unit."""
    return f"{scorer.version}; {scorer.scale}"


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """The first `count` prompts in keyed order: chosen by the run's seed, not by hand; the order decides
    which of them the report shows."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return [by_id[name] for name in keyed_order(by_id, seed, "evaluate", "prompts")[:count]]


def draw_batch(
    policy: Policy,
    version: str,
    inputs: tuple[Conditioning, Conditioning | None, NoiseSource],
    sampler: SamplerConfig,
    tick: Tick,
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Draw one batch with a version of the weights from texts, the other side of guidance and noise.

    Returns:
        Latents (B,C,h,w); images (B,H,W,3) uint8; and the images as a person sees them, at 8 bits, (B,3,H,W)
        in [0,1], with NaN where an image is not finite (at 8 bits it would be black).
    """
    own, negative, noise = inputs
    with policy.weights.use(version):
        latents = sample(policy, own, negative, sampler, noise, tick=tick)
        decoded = policy.decode_latents(latents)
    batch = to_bytes(decoded)
    seen = torch.from_numpy(batch.transpose(0, 3, 1, 2).astype(np.float32) / 255.0)
    seen[~torch.isfinite(decoded).flatten(1).all(dim=1).cpu()] = torch.nan
    return latents, batch, seen


def noise_of(seed: int, keys: Sequence[tuple[str | int, ...]], policy: Policy) -> NoiseSource:
    """The noise of evaluated images, named by (seed, "evaluate", *key)."""
    return NoiseSource([torch_generator(seed, "evaluate", *key) for key in keys], policy.latent_shape)


@dataclass(frozen=True)
class Evaluation:
    """What all evaluated versions share; `run` draws, judges and measures one of them.

    Args:
        prompts: At least one, in order; Vendi scores and KLs use the first `vendi_prompts` and `kl_prompts`.
        judges: Held-out scorers, never trained on; the first decides win rates.
        train_rewards: Scorers of the run's rewards, for the over-optimisation alarm; reported, never
            decisive. No two scorers have one name.
        watched: Names of the rewards among them that the run only looks at (`role: watch`).
        embedder: Features for the Vendi score; None leaves it out.
        batch_size: Images per network call.
        encode: Texts to their conditioning, such as `PromptEmbeddings.select`, which keeps them from one
            version to the next; by default `policy.encode_prompts`.
        overlap: Judge a batch while the next is drawn; changes time only.
        world: The processes that share the batches, every `world.size`-th from `world.rank`; a batch is the
            same whoever draws it.
        folder: Where several processes put the images for the first one, as `save_suite` does; None: each
            keeps its own.
    """

    policy: Policy
    prompts: Sequence[Prompt]
    settings: EvaluationConfig
    judges: Sequence[Scorer]
    seed: int
    train_rewards: Sequence[Scorer] = ()
    watched: Collection[str] = ()
    embedder: Embedder | None = None
    batch_size: int = 64
    encode: Callable[[Sequence[str]], Conditioning] | None = None
    overlap: bool = True
    world: World = field(default_factory=World)
    folder: Path | None = None

    def __post_init__(self) -> None:
        names = [scorer.name for scorer in self._scorers]
        if not self.prompts:
            raise DataError("evaluation.prompts holds no prompt; expected at least one")
        if len(set(names)) != len(names):
            raise DataError(f"evaluation scorers are named {names}; expected different names")

    def run(self, version: str, tick: Tick = lambda: None, *, name: str | None = None) -> SuiteResult:
        """Draw, judge and measure one version, images ordered by prompt, then image.

        Args:
            version: Its name in the policy's weight sets.
            tick: Called after every denoising step of a batch and after every batch; may raise Interrupted.
            name: Name of the result, if not `version` (e.g. "iteration-2" for the weights "current").
        Returns:
            The same result on every process, but for the images, of which those after the first have their
            own.
        """
        started = time.monotonic()
        settings, guided = self.settings, self._conditioning[1] is not None
        embed = self.embedder.features if self.embedder and self._vendi_prompts else None
        with closing(_Judging(self._scorers, embed, self.overlap)) as judging:
            drawn = self._draw(version, judging, tick)
            kl = self._measure_kl(version, tick)
            judging.finish()
        images = self._all_images(drawn)
        features = self._all_rows(judging.features)
        vendi = self._measure_vendi(np.concatenate(features)) if embed else {}
        roles = {scorer.name: "heldout" for scorer in self.judges}
        for scorer in self.train_rewards:
            roles[scorer.name] = "watch" if scorer.name in self.watched else "train"
        scores = {
            scorer: np.concatenate(self._all_rows(values)).astype(float)
            for scorer, values in judging.scores.items()
        }
        prompt_index, image_index = self._rows
        return SuiteResult(
            version=name or version,
            prompts=tuple(self.prompts),
            prompt_index=prompt_index,
            image_index=image_index,
            images=images,
            scores=scores,
            roles=roles,
            scorers={scorer.name: describe_scorer(scorer) for scorer in self._scorers},
            images_per_prompt=settings.images_per_prompt,
            vendi=vendi,
            vendi_images=settings.vendi_images if vendi else 0,
            embedder=self.embedder.name if self.embedder and vendi else "",
            kl=kl,
            kl_estimator=kl_estimator(self.policy.path, settings.sampler) if kl else "",
            sampler=settings.sampler.model_dump(),
            seed=self.seed,
            seconds=time.monotonic() - started,
            network_evaluations=len(prompt_index) * num_network_evaluations(settings.sampler, guided),
        )

    @property
    def _scorers(self) -> list[Scorer]:
        return [*self.judges, *self.train_rewards]

    @property
    def _vendi_prompts(self) -> int:
        measures = self.embedder is not None and self.settings.vendi_images > 1
        return self.settings.vendi_prompts if measures else 0

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and image index of every image: Vendi's prompts get as many images as it needs, the others
        `images_per_prompt`."""
        plain, more = self.settings.images_per_prompt, self.settings.vendi_images
        counts = [max(plain, more if p < self._vendi_prompts else 0) for p in range(len(self.prompts))]
        prompt_index = np.repeat(np.arange(len(self.prompts)), counts)
        return prompt_index, np.concatenate([np.arange(count) for count in counts])

    @cached_property
    def _conditioning(self) -> tuple[Conditioning, Conditioning | None]:
        """Embeddings of all prompts, and that of the other side of guidance; None where none acts."""
        encode = self.encode or self.policy.encode_prompts
        with torch.no_grad():
            own = encode([prompt.text for prompt in self.prompts])
            return own, None if self.settings.sampler.guidance == 1.0 else encode([""])

    def _batch(
        self, rows: Sequence[int], keys: Sequence[tuple[str | int, ...]]
    ) -> tuple[Conditioning, Conditioning | None, NoiseSource]:
        """What a network call needs for the prompts `rows`; image i's noise is named by keys[i]."""
        own, negative = self._conditioning
        empty = None if negative is None else negative.select([0] * len(keys))
        return own.select(rows), empty, noise_of(self.seed, keys, self.policy)

    def _mine(self, count: int) -> range:
        """First rows of the batches of `count` rows that this process draws."""
        stride = self.batch_size * self.world.size
        return range(self.batch_size * self.world.rank, count, stride)

    def _all_rows(self, own: Sequence[np.ndarray], dtype: type[np.floating] = np.float32) -> list[np.ndarray]:
        """The batches of all processes in order, from this process's own, bit for bit."""
        if self.world.size == 1:
            return list(own)
        numbered = [
            [self.world.rank + self.world.size * number, part.tolist()] for number, part in enumerate(own)
        ]
        found = sorted(self.world.gather_objects(numbered), key=lambda one: int(one[0]))
        return [np.asarray(part, dtype=dtype) for _, part in found]

    def _all_images(self, own: Sequence[np.ndarray]) -> np.ndarray:
        """The images of all batches, on the first process; the others hand theirs over as files."""
        mine = np.concatenate(own) if own else np.empty((0, 0, 0, 3), np.uint8)
        if self.world.size == 1 or self.folder is None:
            return mine
        for start, batch in zip(self._mine(len(self._rows[0])), own, strict=True):
            save_images(self.folder, range(start, start + len(batch)), batch)
        self.world.barrier()
        if self.world.rank > 0:
            return mine
        return np.stack([read_image(image_path(self.folder, row)) for row in range(len(self._rows[0]))])

    def _draw(self, version: str, judging: _Judging, tick: Tick) -> list[np.ndarray]:
        images: list[np.ndarray] = []
        for start in self._mine(len(self._rows[0])):
            which, numbers = (index[start : start + self.batch_size].tolist() for index in self._rows)
            prompts = [self.prompts[p] for p in which]
            keys = [(prompt.id, number) for prompt, number in zip(prompts, numbers, strict=True)]
            own, negative, noise = self._batch(which, keys)
            latents, batch, seen = draw_batch(
                self.policy, version, (own, negative, noise), self.settings.sampler, tick
            )
            images.append(batch)
            judging.begin(latents, seen, [prompt.text for prompt in prompts])
            tick()
        return images

    def _measure_kl(self, version: str, tick: Tick) -> list[float]:
        count = min(self.settings.kl_prompts, len(self.prompts)) if version != "base" else 0
        values: list[np.ndarray] = []
        for start in self._mine(count):
            rows = list(range(start, min(start + self.batch_size, count)))
            own, negative, noise = self._batch(rows, [("kl", self.prompts[row].id) for row in rows])
            kl = path_kl(self.policy, version, "base", own, negative, self.settings.sampler, noise, tick=tick)
            values.append(kl.double().cpu().numpy())
        return [float(value) for part in self._all_rows(values, np.float64) for value in part]

    def _measure_vendi(self, features: np.ndarray) -> dict[str, float]:
        """Vendi score of each of Vendi's prompts by its id, from the features (N,d) of all images."""
        prompt_index, image_index = self._rows
        counted = image_index < self.settings.vendi_images
        # An image that is not finite, or all of one colour for an embedder of pixels, has no direction.
        told = np.isfinite(features).all(axis=1) & (features != 0).any(axis=1)
        return {
            prompt.id: vendi_score(features[rows])
            for index, prompt in enumerate(self.prompts[: self._vendi_prompts])
            if (rows := (prompt_index == index) & counted & told).any()
        }


class _Judging:
    """Scores, and features for the Vendi score, of one batch after another."""

    def __init__(
        self, scorers: Sequence[Scorer], embed: Callable[[Tensor], Tensor] | None, overlap: bool
    ) -> None:
        self.scores: dict[str, list[np.ndarray]] = {scorer.name: [] for scorer in scorers}
        self.features: list[np.ndarray] = []
        self._scorers, self._embed, self._overlap = scorers, embed, overlap
        self._budget = Budget("the model that is evaluated")
        self._waiting: Background[Mapping[str, np.ndarray]] | None = None

    def close(self) -> None:
        """Leave no scorer at work; what one of them raised is no news beside what stopped us."""
        if self._waiting is not None:
            self._waiting.wait()

    def begin(self, latents: Tensor, images: Tensor, prompts: Sequence[str]) -> None:
        """Judge a batch once the one before it is done; what that one raised is raised here."""
        self.finish()

        def judge() -> Mapping[str, np.ndarray]:
            scores = score_drawn(self._scorers, Drawn(latents, images), prompts, budget=self._budget)
            if self._embed is not None:
                self.features.append(self._embed(images).detach().cpu().numpy())
            return scores

        self._waiting = Background(judge, name="scoring", in_background=self._overlap)
        if not self._overlap:
            self.finish()

    def finish(self) -> None:
        """Keep the scores of the batch that was begun."""
        scoring, self._waiting = self._waiting, None
        for name, values in scoring.result().items() if scoring else ():
            self.scores[name].append(values)
