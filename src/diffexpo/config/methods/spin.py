"""SPIN-Diffusion: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from diffexpo.config.methods.bases import MarginConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.section import Positive


class SpinConfig(MarginConfig):
    """SPIN-Diffusion (arXiv 2402.10210): data images against the previous iterate's own."""

    type: Literal["spin"] = "spin"
    """The training method."""
    beta: Positive = 2000.0
    """As in Diffusion-DPO, with beta/2 on mean errors (model card: 2000, then 5000 in later iterations;
    whether its code has the factor 1/2 is not known)."""
    reference: Literal["base", "previous", "ema"] = "previous"
    """What errors are measured against: the previous iterate, whose images are the losers (the paper), the
    base model, or a moving average of the iterates."""

    title = "SPIN-Diffusion"
    papers = ("yuan2024spin",)
    pairing = "data"
    prompts_of_data = True
    learns_at_once = False
    group_size = 1
    story = "images of the data set win against those that the model draws for the same prompts."

    def problems(self, run: Run) -> Iterator[str]:
        yield from super().problems(run)
        hybrid, head = run.hybrid, "with algorithm.type = spin"
        if run.offline.source is None:
            yield f"offline.source = null {head}: its winners are images of a data set; name one"
        yield from own_losers(run, head)
        if hybrid.offline_weight > 0:
            yield (
                f"hybrid.offline_weight = {hybrid.offline_weight:g} {head}: the losers of offline pairs are "
                "not the model's own, so these pairs would teach preferences instead; set "
                "hybrid.offline_weight=0 (their winners are used all the same)"
            )
        if run.explore.iterations > 2 and hybrid.decay > 0:
            yield (
                f"hybrid.decay = {hybrid.decay:g} {head}: losers of earlier collections are not images of "
                "the previous iterate, and no longer what has to be told from data; set hybrid.decay=0"
            )

    def one_size_reason(self) -> str:
        return (
            "its winners are data images and its losers the model's own, which would differ in shape within "
            "a pair;"
        )


def own_losers(run: Run, head: str) -> Iterator[str]:
    """What contradicts a method whose losers are images of the newest iterate."""
    if run.explore.iterations == 1:
        yield (
            f"explore.iterations = 1 {head}: its losers are the model's own images, which iteration 1 draws "
            "and iteration 2 is the first to learn from; use two iterations or more"
        )
    if run.explore.agents == 2:
        yield (
            f"explore.agents = 2 {head}: losers are images of the newest iterate, and there is no second "
            "agent; set explore.agents=1"
        )
