"""Evaluate one version of a policy: the same prompts, the same keyed noise, the same judges for every
version.

The noise of an image comes from (run seed, "evaluate", prompt id, image index) and batches are cut alike for
all versions, so two versions' pictures differ by their weights alone. Judges see what a person sees, the
8-bit picture; those that judge latents see the drawn ones. A batch is judged while the next is drawn, as in
collecting; one batch at a time and in order, so nothing depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffexpo.config.schema import EvaluationConfig
from diffexpo.diffusion import NoiseSource, num_network_evaluations, sample
from diffexpo.errors import DataError
from diffexpo.evaluation.divergence import kl_estimator, path_kl
from diffexpo.evaluation.grid import to_uint8
from diffexpo.evaluation.metrics import vendi_score
from diffexpo.evaluation.records import SuiteResult, is_saved, load_suite, save_suite
from diffexpo.online.collect import Scoring
from diffexpo.rewards.scoring import score_drawn
from diffexpo.rng import keyed_order, torch_generator
from diffexpo.types import Conditioning, Drawn, Policy, Prompt, Scorer

__all__ = [
    "SuiteResult",
    "choose_prompts",
    "describe_scorer",
    "evaluate_version",
    "is_saved",
    "load_suite",
    "save_suite",
]

Embed = Callable[[Tensor], Tensor]
Encode = Callable[[Sequence[str]], Conditioning]


def _nothing() -> None:
    pass


def describe_scorer(scorer: Scorer) -> str:
    """What a suite keeps of a scorer: its version and its unit."""
    return f"{scorer.version}; {scorer.scale}"


def choose_prompts(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """The first `count` prompts in keyed order: chosen by the run's seed, not by hand; the order decides who
    is in the grid."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return [by_id[name] for name in keyed_order(by_id, seed, "evaluate", "prompts")[:count]]


def evaluate_version(
    policy: Policy,
    version: str,
    prompts: Sequence[Prompt],
    settings: EvaluationConfig,
    judges: Sequence[Scorer],
    seed: int,
    tick: Callable[[], None] = _nothing,
    *,
    train_rewards: Sequence[Scorer] = (),
    watched: Collection[str] = (),
    embed: Embed | None = None,
    embedder: str = "",
    reference: str = "base",
    name: str | None = None,
    batch_size: int = 64,
    encode: Encode | None = None,
    overlap: bool = True,
) -> SuiteResult:
    """Draw, judge and measure one version.

    Args:
        policy: The model; `version` and `reference` are names in its weight sets.
        prompts: Evaluation prompts in order; the first `vendi_prompts` and `kl_prompts` of them serve those
            numbers.
        settings: Sampler and counts.
        judges: Held-out scorers, never trained on; the first decides win rates.
        seed: The run's seed.
        tick: Called after every denoising step of a batch and after every batch.
        train_rewards: Scorers of the run's rewards, for the over-optimisation alarm; reported, never
            decisive.
        watched: Names of those among them that the run only looks at (`role: watch`).
        embed: Images (B,3,H,W) in [0,1] -> features (B,d) for the Vendi score; None leaves it out.
        embedder: Name of `embed`, printed beside the number.
        name: Name of the result, if not `version` (e.g. "iteration-2" for the weights "current").
        batch_size: Images per network call; the same for all versions.
        encode: Texts to their conditioning, such as `PromptEmbeddings.select`, which keeps them from one
            version to the next; by default `policy.encode_prompts`.
        overlap: Judge a batch while the next is drawn; changes time only.
    Returns:
        A SuiteResult with images (N,H,W,3) uint8 ordered by prompt, then image.
    Raises:
        DataError: no prompts, or two scorers of one name.
        Interrupted: from `tick`.
    """
    scorers = [*judges, *train_rewards]
    names = [scorer.name for scorer in scorers]
    if not prompts:
        raise DataError("evaluation.prompts holds no prompt; expected at least one")
    if len(set(names)) != len(names):
        raise DataError(f"evaluation scorers are named {names}; expected different names")
    started = time.monotonic()
    vendi_prompts = settings.vendi_prompts if embed is not None and settings.vendi_images > 1 else 0
    prompt_index, image_index = _rows(len(prompts), settings, vendi_prompts)
    texts = [prompt.text for prompt in prompts]
    conditioning, negative = _encode(encode or policy.encode_prompts, texts, settings.sampler.guidance)
    images: list[np.ndarray] = []
    with _Judging(scorers, embed if vendi_prompts else None, overlap) as judging:
        for start in range(0, len(prompt_index), batch_size):
            rows = slice(start, start + batch_size)
            which = prompt_index[rows]
            keys = [(prompts[p].id, int(i)) for p, i in zip(which, image_index[rows], strict=True)]
            noise = NoiseSource(
                [torch_generator(seed, "evaluate", *key) for key in keys], policy.latent_shape
            )
            empty = None if negative is None else negative.select([0] * len(keys))
            with policy.weights.use(version):
                latents = sample(
                    policy, conditioning.select(which.tolist()), empty, settings.sampler, noise, tick=tick
                )
                batch = to_uint8(policy.decode_latents(latents).cpu().numpy())
            images.append(batch)
            seen = torch.from_numpy(batch.transpose(0, 3, 1, 2).astype(np.float32) / 255.0)
            judging.begin(latents, seen, [texts[p] for p in which])
            tick()
        calls = num_network_evaluations(settings.sampler, negative is not None)
        kl = _measure_kl(
            policy, version, reference, prompts, settings, conditioning, negative, seed, batch_size, tick
        )
        judging.finish()
    vendi: dict[str, float] = {}
    if vendi_prompts:
        table = np.concatenate(judging.features)
        for index in range(min(vendi_prompts, len(prompts))):
            mine = (prompt_index == index) & (image_index < settings.vendi_images)
            vendi[prompts[index].id] = vendi_score(table[mine])
    return SuiteResult(
        version=name or version,
        prompts=tuple(prompts),
        prompt_index=prompt_index,
        image_index=image_index,
        images=np.concatenate(images),
        scores={
            scorer: np.concatenate(values).astype(np.float64) for scorer, values in judging.scores.items()
        },
        roles={scorer.name: "heldout" for scorer in judges}
        | {scorer.name: "watch" if scorer.name in watched else "train" for scorer in train_rewards},
        scorers={scorer.name: describe_scorer(scorer) for scorer in scorers},
        images_per_prompt=settings.images_per_prompt,
        vendi=vendi,
        vendi_images=settings.vendi_images if vendi else 0,
        embedder=embedder if vendi else "",
        kl=kl,
        kl_estimator=kl_estimator(policy.path, settings.sampler) if kl else "",
        sampler=settings.sampler.model_dump(),
        seed=seed,
        seconds=time.monotonic() - started,
        network_evaluations=len(prompt_index) * calls,
    )


class _Judging:
    """Scores, and features for the Vendi score, of one batch after another."""

    def __init__(self, scorers: Sequence[Scorer], embed: Embed | None, overlap: bool) -> None:
        self.scores: dict[str, list[np.ndarray]] = {scorer.name: [] for scorer in scorers}
        self.features: list[np.ndarray] = []
        self._scorers, self._embed, self._overlap = scorers, embed, overlap
        self._waiting: Scoring | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What stopped us is the news; a scorer must not be left at work behind it.
        if self._waiting is not None:
            self._waiting.wait()

    def begin(self, latents: Tensor, images: Tensor, prompts: Sequence[str]) -> None:
        """Judge a batch once the one before it is done; what that one raised is raised here."""
        self.finish()
        judge = partial(self._judge, latents)
        self._waiting = Scoring(judge, images, prompts, in_background=self._overlap)
        if not self._overlap:
            self.finish()

    def finish(self) -> None:
        """Keep what was begun."""
        scoring, self._waiting = self._waiting, None
        for name, values in scoring.result().items() if scoring else ():
            self.scores[name].append(values)

    def _judge(self, latents: Tensor, images: Tensor, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        scores = score_drawn(self._scorers, Drawn(latents, images), prompts)
        if self._embed is not None:
            self.features.append(self._embed(images).detach().cpu().numpy())
        return scores


def _rows(num_prompts: int, settings: EvaluationConfig, vendi_prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and image index of every picture: Vendi's prompts get as many as it needs, the others
    `images_per_prompt`."""
    counts = [
        max(settings.images_per_prompt, settings.vendi_images if index < vendi_prompts else 0)
        for index in range(num_prompts)
    ]
    return np.repeat(np.arange(num_prompts), counts), np.concatenate([np.arange(count) for count in counts])


def _encode(
    encode: Encode, texts: Sequence[str], guidance: float
) -> tuple[Conditioning, Conditioning | None]:
    with torch.no_grad():
        return encode(texts), None if guidance == 1.0 else encode([""])


def _measure_kl(
    policy: Policy,
    version: str,
    reference: str,
    prompts: Sequence[Prompt],
    settings: EvaluationConfig,
    conditioning: Conditioning,
    negative: Conditioning | None,
    seed: int,
    batch_size: int,
    tick: Callable[[], None],
) -> list[float]:
    count = min(settings.kl_prompts, len(prompts))
    if count == 0 or version == reference:
        return []
    values: list[float] = []
    for start in range(0, count, batch_size):
        rows = list(range(start, min(start + batch_size, count)))
        generators = [torch_generator(seed, "evaluate", "kl", prompts[row].id) for row in rows]
        noise = NoiseSource(generators, policy.latent_shape)
        empty = None if negative is None else negative.select([0] * len(rows))
        kl = path_kl(
            policy, version, reference, conditioning.select(rows), empty, settings.sampler, noise, tick=tick
        )
        values.extend(float(value) for value in kl)
    return values
