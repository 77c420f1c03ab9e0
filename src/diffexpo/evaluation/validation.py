"""What chose among a run's iterates: a judge's scores on prompts of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffexpo.evaluation.metrics import bootstrap_mean
from diffexpo.evaluation.records import RunRecord
from diffexpo.evaluation.templates import digits
from diffexpo.online.keeping import MEAN, best_iterate, is_over

Estimate = tuple[float, float, float]


@dataclass(frozen=True)
class Validation:
    """Mean scores of the iterates by number, and with 95% intervals over prompts; how a run of this patience
    and planned length reads them."""

    judge: str
    num_prompts: int
    means: Mapping[int, float]
    scores: Mapping[int, Estimate]
    patience: int | None
    planned: int

    @property
    def kept(self) -> int:
        """The iterate that is the result, so far."""
        return best_iterate(self.means)

    @property
    def last(self) -> int:
        """The newest iterate."""
        return max(self.means)

    @property
    def is_over(self) -> bool:
        """Whether no further iterate will come."""
        return self.last == self.planned or is_over(self.means, self.patience)

    def sentence(self) -> str:
        """Which iterate is kept, and why."""
        kept, last = digits(self.means[self.kept]), digits(self.means[self.last])
        where = f"{self.num_prompts} validation prompts, which are neither trained nor evaluated on"
        text = f"Iteration {self.kept} is kept: of {len(self.means)} iterates {self.judge} scores it best"
        text += f" on {where} ({kept}; the last one {last})."
        if self.is_over and self.last < self.planned:
            text += (
                f" The run ended after iteration {self.last} of {self.planned}, because {self.patience} in a "
                "row were not better."
            )
        return text


def read_validation(record: RunRecord, *, resamples: int, seed: int) -> Validation | None:
    """The validation of a run with `explore.keep: best`, as far as it came; None: nothing is validated."""
    found = record.validations
    if not found:
        return None
    first = next(iter(found.values()))
    judge = str(first["judge"])
    explore = record.config.get("explore", {})
    return Validation(
        judge=judge,
        num_prompts=len(set(first["prompts"])),
        means={number: float(payload[MEAN]) for number, payload in found.items()},
        scores={
            number: bootstrap_mean(
                payload["scores"][judge], payload["prompts"], resamples=resamples, seed=seed
            )
            for number, payload in found.items()
        },
        patience=explore.get("patience"),
        planned=int(explore.get("iterations", max(found))),
    )
