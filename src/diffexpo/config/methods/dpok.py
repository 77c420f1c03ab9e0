"""DPOK: settings and facts."""

from collections.abc import Iterator
from typing import Literal

from diffexpo.config.methods.bases import ClippedRatioConfig, ReferencedConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import PlainReward, Transitions, ValueBaseline
from diffexpo.config.section import Count, NotNegative, Positive


class DpokConfig(ClippedRatioConfig, ReferencedConfig):
    """DPOK (arXiv 2305.16381)."""

    type: Literal["dpok"] = "dpok"
    """The training method."""
    reward_weight: Positive = 100.0
    """Multiplies the policy term (the authors: 100)."""
    kl_weight: NotNegative = 0.01
    """Multiplies the KL term (the authors: 0.01)."""
    kl: Literal["eps_mse", "gaussian"] = "eps_mse"
    """Squared difference of the guided noise predictions (the authors' code), or the exact Gaussian KL of a
    transition (the paper)."""
    has_value_baseline: bool = True
    """Subtract a learned value of (x_t, prompt, t) from the reward (the authors' `v_flag`: 1)."""
    value_learning_rate: Positive = 1e-4
    """Learning rate of the value network (the authors: 1e-4)."""
    value_steps: Count = 5
    """Updates of the value network for each collection (the authors: 5)."""
    value_batch_size: Count = 256
    """Transitions in each of them (the authors: 256)."""

    title = "DPOK"
    papers = ("fan2023dpok",)
    group_size = 1
    restraint = "raise algorithm.kl_weight"

    @property
    def data(self) -> Transitions:
        baseline = ValueBaseline(self.value_learning_rate, self.value_steps, self.value_batch_size)
        return Transitions(PlainReward(baseline if self.has_value_baseline else None), self.timestep_fraction)

    @property
    def versions(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_weight > 0 else ()

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        if not self.has_value_baseline:
            yield (
                "algorithm.has_value_baseline = false: advantages are plain rewards; if they are all of one "
                "sign, every image is pushed the same way"
            )

    def one_size_reason(self) -> str | None:
        if not self.has_value_baseline:
            return None
        return "the learned baseline reads latents of one shape; set algorithm.has_value_baseline=false, or"
