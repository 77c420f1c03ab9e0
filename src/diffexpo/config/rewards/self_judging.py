"""Models that judge latents by their own denoising errors: cards of `rewards/self_judging.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from diffexpo.config.rewards.card import RewardCard, Run


class SelfJudgeCard(RewardCard):
    """A scorer that asks a model for its denoising errors."""

    has_weights: ClassVar[bool] = True
    licence: ClassVar[str] = "the model's own"
    reads: ClassVar[Literal["images", "latents"]] = "latents"
    groups: ClassVar[frozenset[str]] = frozenset({"self_judge"})
    never_cached: ClassVar[str] = "judges latents by the model that is being trained, so no score stays true"
    is_trained: ClassVar[bool]
    """Whether a model that was trained on pairs judges, against its base, or a base alone."""

    def _wrong(self, run: Run, where: str) -> Iterator[str]:
        yield from super()._wrong(run, where)
        low, high = self.self_judge.timestep_range
        if not low < high:
            yield (
                f"self_judge.timestep_range = [{low:g}, {high:g}] holds no time: expected two numbers, the "
                "first below the second, e.g. [0.3, 1]"
            )
        has_sizes = run.model.buckets and run.explore.aspect != "first"
        if has_sizes and where.startswith("rewards"):
            yield (
                f"type = {self.type} with explore.aspect = {run.explore.aspect}: it judges latents of the "
                "first size only; use a reward that looks at images, or explore.aspect=first"
            )


class ImplicitCard(SelfJudgeCard):
    """The implicit reward of a model that was trained on pairs."""

    scorer: ClassVar[str] = "ImplicitReward"
    what: ClassVar[str] = "a model trained on pairs judges latents: its implicit reward against its base"
    unit: ClassVar[str] = "beta/2 x fall of the denoising error"
    path_is: ClassVar[str] = "a run that was trained on pairs (runs/dpo_offline), or its export"
    source: ClassVar[str] = "yours"
    papers: ClassVar[tuple[str, ...]] = ("wallace2024diffusiondpo",)
    is_trained: ClassVar[bool] = True

    type: Literal["implicit"] = "implicit"

    def _wrong(self, run: Run, where: str) -> Iterator[str]:
        yield from super()._wrong(run, where)
        if self.path == run.model.path:
            yield (
                f"path = {self.path!r} is model.path: the implicit reward is what training on pairs changed, "
                "and of the base itself it is 0 for every image; name a run that was trained on pairs"
            )


class DenoisingCard(SelfJudgeCard):
    """How much the prompt helps the base to denoise."""

    scorer: ClassVar[str] = "DenoisingReward"
    what: ClassVar[str] = "the base model judges latents: how much the prompt lowers its denoising error"
    unit: ClassVar[str] = "difference of mean squared errors, about 0"
    path_is: ClassVar[str] = "a diffusers folder or hub id of the same autoencoder"
    default_path: ClassVar[str | None] = ""
    source: ClassVar[str] = "nothing to fetch (the run's own base)"
    papers: ClassVar[tuple[str, ...]] = ("li2023diffusionclassifier",)
    is_trained: ClassVar[bool] = False

    type: Literal["denoising"] = "denoising"

    def _wrong(self, run: Run, where: str) -> Iterator[str]:
        yield from super()._wrong(run, where)
        beta = self.self_judge.beta
        if beta != type(self.self_judge)().beta:
            yield f"self_judge.beta = {beta:g}: type denoising has no beta, the unit of implicit; remove it"
