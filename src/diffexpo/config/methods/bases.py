"""Settings and facts that several methods share.

A setting that a base declares means the same in all methods below it and survives when a later layer changes
`algorithm.type`. Defaults are those of the papers or of their authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from diffexpo.config.methods.card import Anchor, MethodConfig, Run, Work
from diffexpo.config.methods.data import Pairs
from diffexpo.config.schema import SamplerConfig
from diffexpo.config.section import Count, Fraction, NotNegative, Positive

DECAY = 0.5
"""Default of `reference_decay`."""
SD15_ELEMENTS = 4 * 64 * 64
"""Of a latent of Stable Diffusion 1.5, for which papers state beta."""
DISTANCE = "train/reference_distance"
"""Mean squared difference of the predictions of policy and reference, as methods on pairs measure it."""


class ForwardConfig(MethodConfig):
    """Methods that noise a clean image to one random time and look at the prediction error there."""

    empty_prompt_fraction: Fraction = 0.2
    """Share of rows trained with the empty prompt, policy and reference alike (Diffusion-DPO: 0.2)."""
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Training times: t drawn as usual is mapped to low + (high - low) t, so that losses look at a part of
    the path only (Diffusion-DPO's refiner setting, t below 200 of 1000, is [0, 0.2]). The default is the
    whole path."""

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        low, high = self.timestep_range
        if low >= high:
            shown = f"algorithm.timestep_range = [{low:g}, {high:g}]"
            yield f"{shown} holds no time: expected two numbers, the first below the second, e.g. [0, 0.2]"


class PairsConfig(ForwardConfig):
    """Methods whose loss is a function of a pair's prediction errors."""

    draws: Count = 1
    """Draws (t, eps) of time and noise at which each pair of a step is looked at. Its errors are means over
    them, taken before the loss: the margin of one draw is mostly noise, on which the sigmoid saturates. Draw
    k of K has its time in the k-th of K equally probable slices of `timestep_range`. Forwards and activations
    grow in proportion."""
    signal_pairs: int = Field(default=64, ge=0)
    """Pairs of an iteration on which it is measured how much of one draw's margin is signal, from which
    follows how many `draws` are worth their cost (`signal/...` in the metrics, and in the report). Fewer are
    taken where they would cost more than 2% of the training's network evaluations; 0 measures nothing.
    Training is the same with and without."""

    @property
    def data(self) -> Pairs:
        return Pairs(draws=self.draws)

    @property
    def margin_pairs(self) -> int:
        return self.signal_pairs


class ReferencedConfig(MethodConfig):
    """Methods that measure the policy against a reference."""

    reference: Literal["base", "previous", "ema"] = "base"
    """What errors are measured against: the base model throughout, the previous iterate, or a moving average
    of the iterates (`ema`), r_t = d r_{t-1} + (1 - d) p_t over the trained weights (of adapters: their
    factors) from r_0 = p_0; iteration t + 1 is measured against r_t."""
    reference_decay: Fraction = DECAY
    """d, the share of itself that the reference `ema` keeps after each iteration."""

    @property
    def versions(self) -> tuple[str, ...]:
        return ("reference",)

    @property
    def reference_memory(self) -> float | None:
        return {"base": None, "previous": 0.0, "ema": self.reference_decay}[self.reference]

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        if self.reference != "ema" and self.reference_decay != DECAY:
            yield (
                f"algorithm.reference_decay = {self.reference_decay:g} with algorithm.reference = "
                f"{self.reference}: only ema averages iterates; set algorithm.reference=ema, or "
                f"algorithm.reference_decay={DECAY:g}"
            )

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        same = {
            0.0: "the previous iterate (reference: previous)",
            1.0: "where training starts, and never moves",
        }
        if self.reference == "ema" and self.reference_decay in same:
            yield (
                f"algorithm.reference_decay = {self.reference_decay:g}: the reference is "
                f"{same[self.reference_decay]}"
            )


class LogisticConfig(ReferencedConfig):
    """Methods on the logistic loss of beta times what the policy changed of the reference."""

    restraint = "raise algorithm.beta"

    @property
    def initial_loss(self) -> float | None:
        return math.log(2)


class MarginConfig(PairsConfig, LogisticConfig):
    """Methods on the margin h = -beta/2 [(e_w - e_w_ref) - (e_l - e_l_ref)] of a pair."""

    beta: Positive = 5000.0
    """Pull towards the reference. Multiplies a *mean* squared error (by beta/2), so the pull grows with the
    number of latent elements: 5000 at 16,384 elements (SD 1.5) pulls like 156 at 512."""
    reference_follows: Literal["iteration", "step"] = "iteration"
    """After what the reference `ema` takes in its share of the policy: each iteration, or each optimiser step
    (Linear-DPO: d = 0.95 to 0.995 a step)."""
    reference_budget: Positive | None = None
    """Lets the reference `previous` stay, from p_0 on, until an iteration ends with its predictions farther
    away than this (mean squared difference, `train/reference_distance` of the last steps); then it becomes
    the newest iterate (GARDO resets its reference so). Null: it becomes each one."""
    anchor_weight: NotNegative = 0.0
    """Adds this times beta/2 times the mean squared difference of the policy's prediction from the base's, on
    winners and losers. It holds the common part of both errors, which the margin leaves free. Published
    weights, as shares of the loss's own coefficient, are 0.001 to 0.02."""
    anchor_guidance: float = Field(default=1.0, ge=1.0)
    """Guidance g of the base that `anchor_weight` pulls to, e_u + g (e_c - e_u) with the empty prompt's
    prediction e_u: above 1 the policy takes guidance in, and is to be drawn from without. Rows trained with
    the empty prompt are held to e_u (CRD, arXiv 2603.14128: 4.5)."""

    anchor_draws: Count | None = None
    """At how many of its `draws` each pair is held, chosen anew in every step; null: at all. The pull has the
    same mean with fewer, and costs less."""

    proximal_weight: NotNegative = 0.0
    """Adds this times beta/2 times the mean squared difference of the policy's prediction from the
    reference's, on winners and losers at every draw. A loser's error has no upper end, and raising it lowers
    the loss for ever; from weight 1 on each pair's loss is convex in the predictions where training starts.
    Costs no forward. A reference that does not follow the iterates holds the policy where it began."""

    @property
    def proximal(self) -> float:
        return self.proximal_weight

    @property
    def held_draws(self) -> int:
        return min(self.anchor_draws or self.draws, self.draws)

    @property
    def logit_scale(self) -> float | None:
        return 0.5 * self.beta

    def describe_pull(self, elements: int) -> str | None:
        # beta times a mean over D elements is beta / D times their sum.
        there = self.beta * SD15_ELEMENTS / elements
        return (
            f"beta {self.beta:g} multiplies means over {elements:,} latent elements: it pulls like {there:g} "
            f"at Stable Diffusion 1.5's {SD15_ELEMENTS:,}"
        )

    @property
    def reference_memory(self) -> float | None:
        return super().reference_memory if self.reference_budget is None else 1.0

    def reference_share(self, measured: Mapping[str, object]) -> float:
        if self.reference_budget is None:
            return super().reference_share(measured)
        distance = measured.get(DISTANCE)
        return 0.0 if isinstance(distance, float) and distance > self.reference_budget else 1.0

    @property
    def moving_versions(self) -> tuple[str, ...]:
        follows = self.needs_reference and self.reference_follows == "step"
        return (*super().moving_versions, *(["reference"] if follows else []))

    @property
    def anchor_version(self) -> Literal["reference", "base"] | None:
        if self.anchor_weight == 0:
            return None
        return "reference" if self.needs_reference and not self.moves_reference else "base"

    @property
    def anchor(self) -> Anchor | None:
        version = self.anchor_version
        return None if version is None else Anchor(version, self.anchor_weight, self.anchor_guidance)

    @property
    def anchor_forwards(self) -> int:
        """The prediction for the prompt is at hand where the reference is the base."""
        if self.anchor_version is None:
            return 0
        return (self.anchor_version == "base") + self.has_guided_anchor

    @property
    def has_guided_anchor(self) -> bool:
        """Whether the loss pulls elsewhere than to the base's own prediction."""
        return self.anchor_weight > 0 and self.anchor_guidance > 1

    @property
    def learned_guidance(self) -> float:
        return self.anchor_guidance if self.anchor_weight > 0 else 1.0

    @property
    def initial_loss(self) -> float | None:
        return None if self.has_guided_anchor else super().initial_loss

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        yield from self._reference_problems(run)
        if self.anchor_guidance > 1 and self.anchor_weight == 0:
            yield (
                f"algorithm.anchor_guidance = {self.anchor_guidance:g} with algorithm.anchor_weight = 0: "
                "nothing is held to it; set anchor_weight above 0, e.g. 0.01, or anchor_guidance=1"
            )
        if self.proximal_weight > 0 and not self.needs_reference:
            yield (
                f"algorithm.proximal_weight = {self.proximal_weight:g}, but this loss has no reference to be "
                "held to; set it to 0, or hold the policy to the base with anchor_weight"
            )
        if self.anchor_draws is not None and self.anchor_draws > self.draws:
            yield (
                f"algorithm.anchor_draws = {self.anchor_draws} with algorithm.draws = {self.draws}: a pair "
                f"has no more draws to be held at; set anchor_draws to at most {self.draws}, or leave it out"
            )

    def _reference_problems(self, run: Run) -> Iterator[str]:
        follows, dtype = "algorithm.reference_follows = step", run.tuning.reference_dtype
        kind = f"algorithm.reference = {self.reference}"
        if self.reference_budget is not None and self.reference != "previous":
            yield (
                f"algorithm.reference_budget = {self.reference_budget:g} with {kind}: only the reference "
                "that becomes an iterate can wait for a distance; set algorithm.reference=previous"
            )
        if self.reference_follows == "iteration":
            return
        if self.reference != "ema":
            yield f"{follows} with {kind}: only ema is an average; set algorithm.reference=ema"
        elif self.reference_decay == 0:
            yield (
                f"{follows} with algorithm.reference_decay = 0: the reference would be the policy itself, "
                "and every margin 0; set reference_decay between 0.9 and 1"
            )
        if dtype != "float32":
            yield (
                f"{follows} with tuning.reference_dtype = {dtype}: the average is kept in the reference, "
                "whose rounding would swallow the share of a step; set tuning.reference_dtype=float32"
            )

    def works(self, run: Run) -> Iterator[Work]:
        yield from super().works(run)
        if self.has_guided_anchor:
            yield "anchor to the guided base", "zhu2026crd"
        if self.reference_follows == "step":
            yield "reference that follows every step", "li2026lineardpo"
        if self.reference_budget is not None:
            yield "reference that waits for a distance", "he2025gardo"


class AdvantageConfig(MethodConfig):
    """Methods that weigh an image by its advantage, the reward compared with the other images of its
    prompt."""

    global_std: bool = True
    """Advantages are divided by the std of all rewards of a collection (true) or of the prompt's own images
    (false). Flow-GRPO: true."""
    advantage_clip: Positive = 5.0
    """Advantages are clipped to plus or minus this (DDPO, Flow-GRPO, DiffusionNFT: 5)."""


class TrajectoryConfig(MethodConfig):
    """Methods that learn from the transitions of the sampled trajectory."""

    timestep_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of a trajectory's transitions that is trained, the same number of every trajectory (DDPO:
    all)."""

    stages: ClassVar[tuple[str, ...]] = ("collect", "train", "evaluate")
    orders_by_number: ClassVar[bool] = True
    """It learns from the size of rewards, so an order without numbers (Pareto) is not enough."""

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        yield from self._density(run.explore.sampler)
        head = f"with algorithm.type = {self.type}"
        if run.offline.source is not None:
            yield (
                f"offline.source = {run.offline.source!r} {head}: it learns from the steps in which an image "
                "was drawn, and offline images have none; set offline.source=null"
            )
        if run.pairing.min_margin > 0 and "pair" not in self.stages:
            yield (
                f"pairing.min_margin = {run.pairing.min_margin:g} {head}: it makes no pairs of images; set "
                "it to 0"
            )
        yield from self._mixture(run)
        precision = run.model.inference_precision
        if precision not in ("no", run.training.mixed_precision):
            yield (
                f"model.inference_precision = {precision} {head}: log-probabilities would be recorded in one "
                "precision and replayed in another, so the ratio of the two would not be 1 before the first "
                "update; set it to no, or to training.mixed_precision"
            )
        if run.explore.merge_lora:
            yield (
                f"explore.merge_lora = true {head}: log-probabilities would be recorded with merged weights "
                "and replayed with adapters, which round differently, so the ratio of the two would not be 1 "
                "before the first update; set explore.merge_lora=false"
            )

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        if run.training.warmup_fraction * run.training.steps >= 2:
            yield (
                f"training.warmup_fraction = {run.training.warmup_fraction:g} warms up anew in each of "
                f"{run.explore.iterations} iterations; with few steps an iteration 0 is usual"
            )

    def _density(self, sampler: SamplerConfig) -> Iterator[str]:
        if sampler.name == "ddim" and sampler.eta == 0:
            cause, advice = "explore.sampler.eta = 0", "set eta above 0, e.g. 1"
        elif sampler.name in ("dpmpp", "flow_euler"):
            cause = f"explore.sampler.name = {sampler.name}"
            advice = "use flow_sde" if sampler.name == "flow_euler" else "use ddpm, or ddim with eta above 0"
        elif sampler.name == "flow_sde" and sampler.noise_level == 0:
            cause, advice = "explore.sampler.noise_level = 0", "set it above 0, e.g. 0.7"
        else:
            return
        yield (
            f"{cause} with algorithm.type = {self.type}: the kernel has no density, each step is certain, so "
            f"a transition has no log-probability to raise or lower; {advice}"
        )

    def _mixture(self, run: Run) -> Iterator[str]:
        several = sum(reward.role == "train" for reward in run.rewards) > 1
        if several and self.orders_by_number and run.mixture.kind == "pareto":
            yield (
                f"mixture.kind = pareto with algorithm.type = {self.type}: an order without numbers gives no "
                "reward to learn from; use zscore or rank, or d3po, which compares two images"
            )


class ClippedRatioConfig(TrajectoryConfig):
    """Policy gradients on exp(log-prob - old log-prob), with log-probs averaged per latent element."""

    clip_range: Positive = 1e-4
    """The ratio is clipped to 1 plus or minus this. Log-probs are means per latent element: 1e-4 is a change
    of 1.6 of the true log-ratio at 16,384 elements (DDPO, DPOK, Flow-GRPO: 1e-4)."""
