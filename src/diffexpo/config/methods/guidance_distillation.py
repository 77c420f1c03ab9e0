"""Guidance distillation: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from diffexpo.config.methods.bases import ForwardConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import Images
from diffexpo.config.section import Fraction


class GuidanceDistillationConfig(ForwardConfig):
    """Guidance distillation (arXiv 2210.03142) into the conditional prediction: afterwards images are drawn
    without guidance."""

    type: Literal["guidance_distillation"] = "guidance_distillation"
    """The training method."""
    guidance: float = Field(default=7.5, gt=1.0)
    """Guidance g of the base that is distilled, e_u + g (e_c - e_u). Images are drawn with it too
    (`explore.sampler.guidance`), and evaluated without (`evaluation.sampler.guidance: 1`)."""
    empty_prompt_fraction: Fraction = 0.0
    """Share of rows with the empty prompt, which are held to the base's own prediction for it (0: only
    predictions for prompts are compared)."""

    title = "Guidance distillation"
    papers = ("meng2023distillation",)
    stages = ("train", "evaluate", "collect")
    pairing = "none"
    drawn_by = "base"
    group_size = 1
    story = "the base draws images with guidance, and the model learns to predict there without it the same."

    @property
    def data(self) -> Images:
        return Images()

    @property
    def anchor_version(self) -> Literal["base"]:
        return "base"

    @property
    def anchor_forwards(self) -> int:
        return 2

    @property
    def learned_guidance(self) -> float:
        return self.guidance

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        head = f"with algorithm.type = {self.type}"
        if run.explore.agents == 2 and self.collects(run):
            yield (
                f"explore.agents = 2 {head}: all images are drawn by the base, and there is no second agent; "
                "set explore.agents=1"
            )
        if run.pairing.min_margin > 0:
            yield (
                f"pairing.min_margin = {run.pairing.min_margin:g} {head}: it makes no pairs of images; set "
                "it to 0"
            )
