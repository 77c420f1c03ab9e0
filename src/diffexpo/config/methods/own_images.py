"""What contradicts a method that learns from its own images only. Imports without torch."""

from collections.abc import Iterator

from diffexpo.config.methods.bases import AdvantageConfig, ForwardConfig, ReferencedConfig
from diffexpo.config.methods.card import Run
from diffexpo.config.methods.data import Images


def no_offline(run: Run, why: str) -> Iterator[str]:
    """Offline images, which the method cannot learn from, with the reason."""
    if run.offline.source is not None:
        yield (
            f"offline.source = {run.offline.source!r} with algorithm.type = {run.algorithm.type}: {why}; set "
            "offline.source=null and explore.iterations to 2 or more"
        )


class AgainstOldPolicyConfig(ForwardConfig, ReferencedConfig, AdvantageConfig):
    """Methods whose loss compares the policy with the one that drew the images."""

    restraint = "raise algorithm.kl_weight"

    @property
    def data(self) -> Images:
        return Images(global_std=self.global_std)

    def problems(self, run: Run) -> Iterator[str]:
        """Images that the old policy did not draw."""
        yield from super().problems(run)
        explore, head = run.explore, f"with algorithm.type = {self.type}"
        yield from no_offline(
            run,
            "the loss compares the policy with the one that drew the images, and nobody knows which drew "
            "these",
        )
        if explore.agents == 2:
            yield (
                f"explore.agents = 2 {head}: the main agent's images are drawn by the iterate before the old "
                "policy, against which the loss measures; set explore.agents=1"
            )
        if explore.iterations > 2 and run.hybrid.decay > 0:
            yield (
                f"hybrid.decay = {run.hybrid.decay:g} {head}: images of earlier collections were drawn by "
                "earlier policies than the old one, against which the loss measures; set hybrid.decay=0"
            )

    def notes(self, run: Run) -> Iterator[str]:
        yield from super().notes(run)
        guidance = run.explore.sampler.guidance
        if guidance != 1.0:
            yield (
                f"explore.sampler.guidance = {guidance:g} with algorithm.type = {self.type}: images are "
                "drawn with guidance and trained without, so what drew them is not quite the old policy; the "
                "authors draw with guidance 1"
            )
