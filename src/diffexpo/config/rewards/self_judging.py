"""Models that judge latents by their own denoising errors: cards of `rewards/self_judging.py`."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from diffexpo.config.rewards.card import RewardCard, Run


class SelfJudgeCard(RewardCard):
    """A scorer that asks a model for its denoising errors."""

    has_weights = True
    licence = "the model's own"
    reads = "latents"
    groups = frozenset({"self_judge"})
    never_cached = "judges latents by the model that is being trained, so no score stays true"
    is_trained: ClassVar[bool]
    """Whether a model that was trained on pairs judges, against its base, or a base alone."""

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
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

    scorer = "ImplicitReward"
    what = "a model trained on pairs judges latents: its implicit reward against its base"
    unit = "beta/2 x fall of the denoising error"
    path_is = "a run that was trained on pairs (runs/dpo_offline), or its export"
    path_is_local = True
    source = "yours"
    papers = ("wallace2024diffusiondpo",)
    is_trained = True

    type: Literal["implicit"] = "implicit"

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        if self.path == run.model.path:
            yield (
                f"path = {self.path!r} is model.path: the implicit reward is what training on pairs changed, "
                "and of the base itself it is 0 for every image; name a run that was trained on pairs"
            )


class DenoisingCard(SelfJudgeCard):
    """How much the prompt helps the base to denoise."""

    scorer = "DenoisingReward"
    what = "the base model judges latents: how much the prompt lowers its denoising error"
    unit = "difference of mean squared errors, about 0"
    path_is = "a diffusers folder or hub id of the same autoencoder"
    default_path = ""
    source = "nothing to fetch (the run's own base)"
    papers = ("li2023diffusionclassifier",)
    is_trained = False

    type: Literal["denoising"] = "denoising"

    def problems(self, run: Run, where: str) -> Iterator[str]:
        yield from super().problems(run, where)
        beta = self.self_judge.beta
        if beta != type(self.self_judge)().beta:
            yield f"self_judge.beta = {beta:g}: type denoising has no beta, the unit of implicit; remove it"
