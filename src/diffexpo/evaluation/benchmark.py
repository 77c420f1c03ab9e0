"""What an evaluation came to: means by the suite's rule, win rates, groups, where judges disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

import diffexpo
from diffexpo.config.rewards import RewardCard
from diffexpo.config.suites import Suite
from diffexpo.errors import ConfigError
from diffexpo.evaluation.contenders import finite
from diffexpo.evaluation.gallery import Gallery, Rows
from diffexpo.evaluation.metrics import WinRate, bootstrap_mean, win_rate
from diffexpo.evaluation.ranking import Ranking, duels_of_scores, rank
from diffexpo.evaluation.statistics import LEVEL, Scores, holm
from diffexpo.evaluation.totals import Estimate, chunk_means, in_order, total

Json = dict[str, Any]
FORMAT = 1
RESAMPLES = 10000


@dataclass(frozen=True)
class Judge:
    """A scorer of an evaluation: its settings in words, its version, and the folder of its scores."""

    name: str
    type: str
    what: str
    path: str
    version: str
    unit: str
    biases: str
    key: str
    is_share: bool = False

    @staticmethod
    def of(card: RewardCard, version: str, scale: str, key: str) -> Judge:
        """The judge of a card whose scorer has this version and unit."""
        named = card.chosen_path or ""
        return Judge(
            card.name, card.type, card.what, named, version, scale, card.biases, key, card.is_right_or_wrong
        )


@dataclass(frozen=True)
class Judged:
    """A model with its scores (N,) by judge, NaN where there is none; `trained_by` are judges that its
    training used."""

    label: str
    what: str
    gallery: Gallery
    scores: Mapping[str, np.ndarray]
    trained_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Mean scores of some of the prompts by (model, judge); None where no image of theirs has a score."""

    name: str
    num_prompts: int
    means: Mapping[tuple[str, str], Estimate | None]
    spreads: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Outcome:
    """The scores of an evaluation and what follows from them. `order` is the place of a prompt, by id, in
    the published list."""

    suite: Suite
    rows: Rows
    models: tuple[Judged, ...]
    judges: tuple[Judge, ...]
    order: Mapping[str, int]
    _wins: dict[tuple[str, str], dict[str, WinRate | None]] = field(default_factory=dict, repr=False)

    def model(self, label: str) -> Judged:
        """A model by its label; a ConfigError lists those that there are."""
        for model in self.models:
            if model.label == label:
                return model
        known = ", ".join(repr(model.label) for model in self.models)
        raise ConfigError(f"no model is called {label!r}; there are {known}")

    @cached_property
    def categories(self) -> list[str]:
        """Category of every row."""
        return [self.rows.prompt(row).category for row in range(len(self.rows))]

    @cached_property
    def totals(self) -> dict[tuple[str, str], Estimate | None]:
        """Total of every (model, judge) by the suite's rule; None where the judge scored nothing."""
        return {
            (model.label, judge.name): self._total(model.scores[judge.name])
            for model in self.models
            for judge in self.judges
        }

    def wins(self, judge: str, against: str) -> dict[str, WinRate | None]:
        """How often each other model beats one under a judge; None where they share no scored image, or the
        judge trained one of them."""
        if (judge, against) not in self._wins:
            others = [model for model in self.models if model.label != against]
            self._wins[judge, against] = {model.label: self._win(model, against, judge) for model in others}
        return self._wins[judge, against]

    def _win(self, model: Judged, against: str, judge: str) -> WinRate | None:
        reference = self.model(against)
        mine, theirs = model.scores[judge], reference.scores[judge]
        is_fair = judge not in (*model.trained_by, *reference.trained_by)
        if not is_fair or not (np.isfinite(mine) & np.isfinite(theirs)).any():
            return None
        return win_rate(mine, theirs, prompts=self.rows.prompt_ids, resamples=RESAMPLES, seed=self.suite.seed)

    def p_values(self, judge: str, against: str) -> dict[str, float]:
        """P-value of each of `wins`, the exact sign test over prompts, corrected for the number of models
        that are compared with the one (Holm); NaN where nothing is compared."""
        wins = self.wins(judge, against)
        plain = [math.nan if win is None else win.p_value for win in wins.values()]
        return dict(zip(wins, holm(plain), strict=True))

    def verdicts(self, judge: str, against: str) -> dict[str, str | None]:
        """`better` or `worse` of each of `wins` whose whole interval lies on one side of one half and, where
        several models are compared with the one, whose corrected p-value is below 5%; else `undecided`, and
        None where nothing is compared."""
        wins, p_values = self.wins(judge, against), self.p_values(judge, against)
        are_several = sum(win is not None for win in wins.values()) > 1
        found: dict[str, str | None] = {}
        for label, win in wins.items():
            is_sure = not are_several or p_values[label] < LEVEL
            found[label] = None if win is None else win.verdict if is_sure else "undecided"
        return found

    def by_image(self, model: Judged, judge: str) -> Scores:
        """A model's scores under a judge by (seed, prompt, image)."""
        rows, values = self.rows, model.scores[judge]
        return {
            (self.suite.seed, rows.prompt_ids[row], rows.index(row)): float(value)
            for row, value in enumerate(values)
        }

    def ranking(self, judge: str) -> Ranking | None:
        """Bradley-Terry strengths of three models or more under a judge that trained none of them; those that
        it trained are left out."""
        fair = [model for model in self.models if judge not in model.trained_by]
        duels = duels_of_scores({model.label: self.by_image(model, judge) for model in fair})
        return rank(duels) if len({duel.second for duel in duels}) > 1 else None

    def excluded(self, model: Judged) -> dict[str, int]:
        """Images of a model without a score, by judge; 0 ones are left out."""
        counts = {name: int((~np.isfinite(scores)).sum()) for name, scores in model.scores.items()}
        return {name: count for name, count in counts.items() if count}

    @cached_property
    def groups(self) -> dict[str, list[Group]]:
        """The prompts by category or by an attribute, for each of the suite's `groups`, in the order of the
        suite; empty ones too, where the suite names their category."""
        return {kind: found for kind in self.suite.groups if (found := self._groups(kind))}

    def _groups(self, kind: str) -> list[Group]:
        values = [self._value(row, kind) for row in range(len(self.rows))]
        wanted = self.suite.categories if kind == "category" else {}
        names = in_order([value for value in values if value], wanted)
        names += [name for name in wanted if name not in names]
        return [self._group(name, np.array([value == name for value in values])) for name in names]

    def disagreements(
        self, model: str, against: str, count: int = 6
    ) -> tuple[tuple[str, str], list[int]] | None:
        """Where the first judge and the one that agrees with it least contradict each other about two models:
        both judges, and the rows on which they do so most; None where nobody contradicts.

        A row's disagreement is the product of the two differences, each in units of its standard deviation.
        """
        gaps = {
            judge.name: _standard(
                self.model(model).scores[judge.name] - self.model(against).scores[judge.name]
            )
            for judge in self.judges
        }
        first, *others = gaps
        products = {other: gaps[first] * gaps[other] for other in others}
        least = min(products, key=lambda other: float(products[other].sum()), default=None)
        if least is None or model == against:
            return None
        product = products[least]
        rows = [int(row) for row in np.argsort(product, kind="stable")[:count] if product[row] < 0]
        return ((first, least), rows) if rows else None

    def summary(self, against: str) -> Json:
        """Every number as JSON values, intervals as [mean, low, high]; what there is not is null."""
        models: Json = {}
        for model in self.models:
            facts = model.gallery.facts()
            models[model.label] = {
                "what": model.what,
                "identity": facts.get("identity"),
                "sampler": model.gallery.drawn_with(),
                "scores": {judge.name: self.totals[model.label, judge.name] for judge in self.judges},
                "excluded": self.excluded(model),
                "trained_by": list(model.trained_by),
                "cost": {
                    "network_evaluations": model.gallery.spent("evaluations"),
                    "seconds": model.gallery.spent("seconds"),
                },
            }
        for judge in self.judges:
            p_holm = self.p_values(judge.name, against)
            for label, win in self.wins(judge.name, against).items():
                told: Json | None = None
                if win is not None:
                    told = {"rate": list(win.interval), "p_value": win.p_value, "p_holm": p_holm[label]}
                models[label].setdefault("win_rate", {})[judge.name] = told
        found: Json = {
            "format": FORMAT,
            "diffexpo": diffexpo.__version__,
            "suite": self.suite.name,
            "prompts": len(self.rows.prompts),
            "images_per_prompt": self.rows.images_per_prompt,
            "seed": self.suite.seed,
            "against": against,
            "judges": [{**vars(judge)} for judge in self.judges],
            "models": models,
            "ranking": {
                judge.name: [asdict(one) for one in ranked.models]
                for judge in self.judges
                if (ranked := self.ranking(judge.name)) is not None
            },
            "groups": {
                kind: {group.name: _group_numbers(group) for group in groups}
                for kind, groups in self.groups.items()
            },
        }
        plain: Json = finite(found)
        return plain

    def _value(self, row: int, kind: str) -> str:
        prompt = self.rows.prompt(row)
        return prompt.category if kind == "category" else str(prompt.attributes.get(kind, ""))

    def _total(self, scores: np.ndarray) -> Estimate | None:
        if not np.isfinite(scores).any():
            return None
        options = {"resamples": RESAMPLES, "seed": self.suite.seed}
        return total(self.suite.rule, scores, self.categories, self.rows.prompt_ids, **options)

    def _group(self, name: str, members: np.ndarray) -> Group:
        places = np.array([self.order[prompt] for prompt in self.rows.prompt_ids])
        chosen = np.flatnonzero(members)
        chosen = chosen[np.argsort(places[chosen], kind="stable")]
        ids = [self.rows.prompt_ids[row] for row in chosen]
        means: dict[tuple[str, str], Estimate | None] = {}
        spreads: dict[tuple[str, str], float] = {}
        for model in self.models:
            for judge in self.judges:
                scores, key = model.scores[judge.name][chosen], (model.label, judge.name)
                is_there = bool(np.isfinite(scores).any())
                options = {"resamples": RESAMPLES, "seed": self.suite.seed}
                means[key] = bootstrap_mean(scores, ids, **options) if is_there else None
                spreads[key] = (
                    chunk_means(scores)[1] if is_there and self.suite.rule == "chunks" else math.nan
                )
        return Group(name, len(set(ids)), means, spreads)


def _group_numbers(group: Group) -> Json:
    means = {f"{model}/{judge}": mean for (model, judge), mean in group.means.items()}
    return {"prompts": group.num_prompts, **means}


def _standard(gap: np.ndarray) -> np.ndarray:
    """Differences in units of their standard deviation; 0 for those that are not known."""
    known = np.isfinite(gap)
    spread = float(gap[known].std()) if known.any() else 0.0
    standard: np.ndarray = np.where(known, gap, 0.0) / spread if spread > 0 else np.zeros_like(gap)
    return standard


def gates(texts: Sequence[str]) -> dict[str, float]:
    """`--fail-below` as numbers by name: `win_rate=0.5`, `JUDGE=0.3`; a ConfigError says what is expected."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(
                f"--fail-below {text!r}: expected win_rate=0.5, or the name of a judge and its least mean"
            )
    return found


def check_gates(least: Mapping[str, float], judges: Sequence[str], num_models: int) -> None:
    """Refuse, with a ConfigError, bounds on what is not measured."""
    for name, bound in least.items():
        known = ["win_rate", "win_rate_low", *judges]
        if name not in known:
            raise ConfigError(
                f"--fail-below {name}={bound:g}: there is no {name!r}; expected one of {', '.join(known)}"
            )
        if name.startswith("win_rate") and (num_models < 2 or not judges):
            needs = "two models" if num_models < 2 else "a judge"
            raise ConfigError(f"--fail-below {name}={bound:g}: a win rate needs {needs}")


def failures(outcome: Outcome, least: Mapping[str, float], against: str) -> list[str]:
    """What falls below its bound, a sentence each; see `check_gates` for what is refused.

    `win_rate` is that of every model against the reference under the first judge, `win_rate_low` the lower
    end of its interval; any other name is a judge, whose total counts for every model but the reference (the
    only one, where there is one). A number that is not known fails.
    """
    check_gates(least, [judge.name for judge in outcome.judges], len(outcome.models))
    tested = [model.label for model in outcome.models if model.label != against] or [against]
    found = []
    for name, bound in least.items():
        is_win = name.startswith("win_rate")
        wins = outcome.wins(outcome.judges[0].name, against) if is_win else {}
        for label in tested:
            win, mean = wins.get(label), outcome.totals.get((label, name))
            value = math.nan if mean is None else mean[0]
            if win is not None:
                value = win.rate if name == "win_rate" else win.low
            if not value >= bound:
                found.append(f"{label}: {name} is {value:.4g}, below {bound:g}")
    return found
