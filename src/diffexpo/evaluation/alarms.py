"""Warnings to read before trusting a run: each states what was seen and what to do about it.

The input is a `History`: one entry per evaluated iteration (0 is the base model). What is unknown is None or
missing and raises no alarm. The thresholds are constants here, which the documentation lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from diffexpo.online.improved_pairs import IDENTITY, UNRELATED

COLLAPSE_ACCURACY = 0.9
ERROR_RISE = 0.2
COMMON_PART = 0.75
"""Common rise of both errors over the reference's, or over a larger anchor's, in the mean over an iteration
and as a share of the errors with which training began, beyond which a collapse is near. On scenes it was 0.6
in the first trained iteration of two runs that collapsed and 1.3 and more in their second one; in three that
held at most 0.43 above the reference and 0.23 above the anchor (docs/keeping.md). The unit are the first
errors, because those of a reference that moves along rise too."""
NORM_GROWTH = 0.07
"""Growth of predictions over those of the reference, or of a larger anchor, in the mean over an iteration,
beyond which a policy overshoots. On scenes it was 0.10 and 0.11 in the first trained iterations of two runs
that collapsed, and 0.04 to 0.053 throughout three that held (docs/keeping.md). NormGuard (arXiv 2606.27771)
finds 0.05 to 0.15 after DPO, NFT and AWM."""
DIVERSITY_DROP = 0.2
DIVERSITY_LOSS = 0.5
TIE_SHARE = 0.5
FAILED_SHARE = 0.05
KL_GROWTH = 1.5
LEARNING_ACCURACY = 0.505

RESTRAINT = (
    "Lower training.learning_rate or raise algorithm.beta (both by 3 to 10 times); or set "
    "algorithm.anchor_weight = 0.01, which holds predictions to the base's."
)

Severity = Literal["critical", "warning", "note"]


@dataclass(frozen=True)
class Alarm:
    """One warning: `message` says what was seen, `what_to_do` what usually helps."""

    name: str
    severity: Severity
    message: str
    what_to_do: str


@dataclass(frozen=True)
class Snapshot:
    """What is known after one iteration (0: the base). Rewards are (mean, low, high) with a 95% interval.

    Errors are means over the last tenth of the iteration's optimiser steps, `common_part` and norms over all
    of them; `dropped` are pairing counts, `validation` is the mean score of the validation judge.
    `improved_distance` is the mean squared latent distance of improved images to what they were improved
    from, divided by that between losers of different prompts.
    `train_change` is what the training reward gained on the base, image by image, and `heldout_changes` what
    the held-out judge's score gained on earlier iterates by number (0: the base); unknown ones are left out,
    and then means are compared.
    """

    iteration: int
    train_reward: tuple[float, float, float] | None = None
    heldout_reward: tuple[float, float, float] | None = None
    win_rate: tuple[float, float, float] | None = None
    vendi: float | None = None
    kl: float | None = None
    implicit_accuracy: float | None = None
    winner_error: float | None = None
    loser_error: float | None = None
    winner_reference_error: float | None = None
    loser_reference_error: float | None = None
    common_part: float | None = None
    anchor_error: float | None = None
    norm_ratio: float | None = None
    anchor_norm_ratio: float | None = None
    validation: float | None = None
    reward_std: float | None = None
    images: int | None = None
    images_failed: int | None = None
    groups: int | None = None
    dropped_ties: int | None = None
    skipped_steps: int | None = None
    improved_distance: float | None = None
    train_change: tuple[float, float, float] | None = None
    heldout_changes: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def reference_error(self) -> float | None:
        """Mean error of the reference on winners and losers."""
        if self.winner_reference_error is None or self.loser_reference_error is None:
            return None
        return 0.5 * (self.winner_reference_error + self.loser_reference_error)

    @property
    def score(self) -> float | None:
        """What is known of the images' worth: the validation judge's score, else the held-out judge's."""
        if self.validation is None and self.heldout_reward is not None:
            return self.heldout_reward[0]
        return self.validation


@dataclass(frozen=True)
class History:
    """Snapshots in order of iteration, base first where it was evaluated.

    `run` is how commands name the run; `kl_budget` is in nats per image, None for no limit; `restraint`
    advises what holds this method closer to the base; `has_offline` says that it learns from given images
    too; `kept` is the iterate that a validation chose: what is said of the result is then said of it.
    """

    snapshots: Sequence[Snapshot] = field(default_factory=tuple)
    kl_budget: float | None = None
    restraint: str = "raise algorithm.beta"
    has_offline: bool = True
    kept: int | None = None
    run: str = "RUN"


def check_alarms(history: History) -> list[Alarm]:
    """All alarms that a history raises, the critical ones first; none is no proof that all is well."""
    found: list[Alarm] = []
    trained = [item for item in history.snapshots if item.iteration > 0]
    start, before = start_error(trained), None
    for item in history.snapshots:
        alarms = [*_flat_rewards(item)]
        if item.iteration > 0:
            sound = sound_before(trained, item.iteration, start)
            alarms += [*early_alarms(item, start, history.run, sound), *_training(item), *_improvement(item)]
            alarms += _errors_rise(item, before)
        found += [replace(one, message=f"iteration {item.iteration}: {one.message}") for one in alarms]
        before = item
    known = [item for item in trained if history.kept is None or item.iteration <= history.kept]
    if known:
        result = known[-1]
        found += [*_last(result, history), *_idle_kl(known, history)]
        base = next((item for item in history.snapshots if item.iteration == 0), None)
        if base is not None:
            found += [*_over_optimised(base, result, history), *_diversity(base, result, history)]
    order = ("critical", "warning", "note")
    return sorted(found, key=lambda alarm: order.index(alarm.severity))


def looked_for(history: History) -> dict[str, bool]:
    """What alarms look for, in words, and whether this history has the numbers for it."""
    trained = [item for item in history.snapshots if item.iteration > 0]
    result = trained[-1] if trained else Snapshot(0)
    base = next((item for item in history.snapshots if item.iteration == 0), Snapshot(0))
    errors = any(item.implicit_accuracy is not None and item.reference_error for item in trained)
    both = base.train_reward and result.train_reward and base.heldout_reward and result.heldout_reward
    return {
        "collapse (accuracy up while both errors rise)": bool(errors),
        "over-optimisation": bool(both),
        "loss of diversity": base.vendi is not None and result.vendi is not None,
        "flat rewards": any(item.reward_std is not None for item in history.snapshots),
        "many ties": any(item.groups for item in history.snapshots),
        "failing scorers": any(item.images_failed is not None for item in history.snapshots),
        "KL without return": sum(bool(item.kl and item.heldout_reward) for item in trained) > 1,
        "worse than the base": result.win_rate is not None,
    }


def _training(item: Snapshot) -> Iterator[Alarm]:
    if item.implicit_accuracy is not None and item.implicit_accuracy <= LEARNING_ACCURACY:
        seen = f"implicit accuracy ended at {item.implicit_accuracy:.3f}, no better than a coin."
        advice = "Train longer, raise training.learning_rate, or check that winners truly differ."
        yield Alarm("no_learning", "note", seen, advice)
    if item.skipped_steps:
        seen = f"{item.skipped_steps} optimiser step(s) were skipped for a non-finite loss or gradient."
        advice = "Lower training.learning_rate, or use float32 or bf16 instead of fp16."
        yield Alarm("skipped_steps", "warning", seen, advice)


def early_alarms(
    item: Snapshot, start: float | None = None, run: str = "RUN", sound: int | None = None
) -> list[Alarm]:
    """What an iteration's training tells of its iterate before an image of it is looked at.

    `start` is the error with which the run's training began (`start_error`), by default that of the
    iteration's own reference; `run` is how commands name the run; `sound` is the iterate to go back to
    (`sound_before`), by default the one before.
    """
    back = item.iteration - 1 if sound is None else sound
    return [*(list(_collapse(item)) or _common_part(item, start, run, back)), *_norm(item)]


def sound_before(snapshots: Sequence[Snapshot], iteration: int, start: float | None) -> int:
    """The last iterate before an iteration whose own training raised no critical alarm; 0: the base."""
    earlier = [item for item in snapshots if 0 < item.iteration < iteration]
    sound = [
        item.iteration
        for item in earlier
        if not any(alarm.severity == "critical" for alarm in early_alarms(item, start))
    ]
    return max(sound, default=0)


def use_iterate(run: str, iteration: int) -> str:
    """The command that exports an earlier iterate, as a sentence; the base needs none."""
    if iteration < 1:
        return "Go back to the base: there is no earlier iterate."
    return f"Use an earlier iterate: `diffexpo export {run} --iteration {iteration}`."


def start_error(snapshots: Sequence[Snapshot]) -> float | None:
    """Mean error of the reference of the first iteration that was trained; None: there is no reference."""
    return next((item.reference_error for item in snapshots if item.reference_error), None)


def _collapse(item: Snapshot) -> Iterator[Alarm]:
    accuracy, rise = item.implicit_accuracy, _rises(item)
    if rise is not None and accuracy is not None and accuracy > COLLAPSE_ACCURACY:
        seen = (
            f"{rise}, while implicit accuracy is {accuracy:.2f}: the model tells the pairs apart by "
            "forgetting how to denoise both of them (collapse)."
        )
        yield Alarm("collapse", "critical", seen, RESTRAINT)


def _common_part(item: Snapshot, start: float | None, run: str, back: int) -> Iterator[Alarm]:
    reference = item.reference_error
    if item.common_part is None or not reference:
        return
    # An anchor, guided or not, has errors of its own, which a policy that follows it takes over.
    errors, expected = (1 + item.common_part) * reference, max(reference, item.anchor_error or 0.0)
    excess = (errors - expected) / (start or reference)
    if excess > COMMON_PART:
        whose = "the reference's" if expected == reference else "the anchor's"
        seen = (
            f"in the mean over its steps the errors of winners and losers together lie {excess:.0%} above "
            f"{whose}, as a share of the errors with which training began (more than {COMMON_PART:.0%}): "
            "runs with so large a common part collapsed within a few iterations."
        )
        advice = f"{use_iterate(run, back)} {RESTRAINT}"
        yield Alarm("common_part", "critical", seen, advice)


def _norm(item: Snapshot) -> Iterator[Alarm]:
    if item.norm_ratio is None:
        return
    growth = item.norm_ratio / max(1.0, item.anchor_norm_ratio or 1.0) - 1
    if growth > NORM_GROWTH:
        whose = "the reference's" if (item.anchor_norm_ratio or 1.0) <= 1.0 else "the anchor's"
        seen = (
            f"predictions became {growth:.1%} larger than {whose} (more than {NORM_GROWTH:.0%}): the model "
            "overshoots, which the errors of pairs do not show."
        )
        yield Alarm("prediction_norm", "warning", seen, RESTRAINT)


def _errors_rise(item: Snapshot, before: Snapshot | None) -> Iterator[Alarm]:
    """Both errors up, and the images no better for it."""
    rise, score = _rises(item), item.score
    if rise is None or before is None or score is None or before.score is None or score >= before.score:
        return
    seen = f"{rise}, and the score fell from {before.score:.3g} to {score:.3g}: it denoises both worse."
    yield Alarm("errors_rise", "warning", seen, RESTRAINT)


def _rises(item: Snapshot) -> str | None:
    """By how much both errors rose over those of the reference and of the anchor, in words; None: they did
    not."""
    winner = _rise(item.winner_error, item.winner_reference_error, item.anchor_error)
    loser = _rise(item.loser_error, item.loser_reference_error, item.anchor_error)
    if winner is None or loser is None or min(winner, loser) <= ERROR_RISE:
        return None
    over = "the reference" + (" and the anchor" if item.anchor_error is not None else "")
    return f"the error on winners rose by {winner:.0%} and on losers by {loser:.0%} over {over}"


def _rise(error: float | None, reference: float | None, anchor: float | None) -> float | None:
    if error is None or reference is None or reference <= 0:
        return None
    return error / max(reference, anchor or 0.0) - 1


def _improvement(item: Snapshot) -> Iterator[Alarm]:
    """The two ways in which an improvement model fails: it repeats its input, or ignores it."""
    distance = item.improved_distance
    if distance is None:
        return
    far = f"{distance:.3f} times as far from their losers"
    seen = f"improved images lie {far} as losers of different prompts do"
    if distance < IDENTITY:
        seen += f" (below {IDENTITY:g}): they are their losers again, and such pairs teach nothing."
        advice = (
            "Lower algorithm.improver.image_scale, raise text_scale, or train the improvement model longer."
        )
        yield Alarm("improver_identity", "critical", seen, advice)
    if distance > UNRELATED:
        verdict = "they have nothing to do with their losers, so the pairs show no improvement of them."
        advice = (
            "Raise algorithm.improver.image_scale, raise the share of the task reconstruct, or train the "
            "improvement model longer."
        )
        yield Alarm("improver_unrelated", "warning", f"{seen} (above {UNRELATED:g}): {verdict}", advice)


def _flat_rewards(item: Snapshot) -> Iterator[Alarm]:
    if item.reward_std is not None and item.reward_std == 0.0:
        seen = "all collected images got the same reward, so none is better than another."
        advice = "Check the scorer and that the images are not blank."
        yield Alarm("zero_variance", "critical", seen, advice)
    if item.groups and item.dropped_ties is not None and item.dropped_ties / item.groups > TIE_SHARE:
        seen = f"{item.dropped_ties} of {item.groups} prompts gave a tie, from which nothing is learned."
        remedies = "draw more images a prompt, or raise exploration (negatives, guidance)."
        yield Alarm("many_ties", "warning", seen, f"Lower pairing.min_margin, {remedies}")
    if item.images and item.images_failed is not None and item.images_failed / item.images > FAILED_SHARE:
        seen = f"scoring failed for {item.images_failed} of {item.images} images; they were left out."
        yield Alarm("scorer_failures", "warning", seen, "Look at the scorer's own messages in log.txt.")


def _over_optimised(base: Snapshot, last: Snapshot, history: History) -> Iterator[Alarm]:
    if not (base.train_reward and last.train_reward and base.heldout_reward and last.heldout_reward):
        return
    train, last_train = base.train_reward[0], last.train_reward[0]
    heldout, last_heldout = base.heldout_reward[0], last.heldout_reward[0]
    change = last.heldout_changes.get(0)
    gain = last_train - train if last.train_change is None else last.train_change[0]
    if gain <= 0 or (last_heldout - heldout if change is None else change[0]) >= 0:
        return
    fell = last.heldout_reward[2] < heldout if change is None else change[2] < 0
    sure = fell or (last.win_rate is not None and last.win_rate[2] < 0.5)
    paired = (
        ""
        if change is None
        else f" (image by image {change[0]:+.3g}, 95% {change[1]:+.3g} to {change[2]:+.3g})"
    )
    seen = (
        f"the training reward rose from {train:.3g} to {last_train:.3g} while the held-out judge fell from "
        f"{heldout:.3g} to {last_heldout:.3g}{paired}: the model pleases its own judge only."
    )
    earlier = [item for item in history.snapshots if item.iteration < last.iteration and item.heldout_reward]
    best = max(earlier, key=lambda item: item.heldout_reward[0] if item.heldout_reward else 0.0)
    remedies = f"{_sentence(history.restraint)}, train fewer steps, or mix in a second reward."
    advice = f"{use_iterate(history.run, best.iteration)} {remedies}"
    yield Alarm("over_optimisation", "critical" if sure else "warning", seen, advice)


def _diversity(base: Snapshot, last: Snapshot, history: History) -> Iterator[Alarm]:
    if base.vendi is None or last.vendi is None or base.vendi <= 1.0:
        return
    drop = 1.0 - (last.vendi - 1.0) / (base.vendi - 1.0)
    if drop > DIVERSITY_DROP:
        seen = (
            f"the Vendi score fell from {base.vendi:.2f} to {last.vendi:.2f} (above its minimum of 1 that is "
            f"{drop:.0%} less): images of one prompt look more alike."
        )
        mixture = "keep offline data in the mixture, " if history.has_offline else ""
        advice = f"{_sentence(history.restraint)}, {mixture}or train fewer steps."
        yield Alarm("diversity", "critical" if drop > DIVERSITY_LOSS else "warning", seen, advice)


def _last(last: Snapshot, history: History) -> Iterator[Alarm]:
    if last.win_rate is not None and last.win_rate[2] < 0.5:
        rate, low, high = last.win_rate
        interval = f"{rate:.0%} (95% interval {low:.0%} to {high:.0%})"
        seen = f"the held-out judge prefers the base model: win rate {interval}."
        remedies = dict.fromkeys(["lower training.learning_rate", history.restraint])
        advice = f"Do not use this model. {_sentence(' or '.join(remedies))}."
        yield Alarm("worse_than_base", "critical", seen, advice)
    budget = history.kl_budget
    if budget is not None and last.kl is not None and last.kl > budget:
        seen = f"the KL to the base is {last.kl:.3g} nats per image, above the budget of {budget:.3g}."
        within = [item.iteration for item in history.snapshots if item.kl is not None and item.kl <= budget]
        advice = f"{use_iterate(history.run, max(within, default=0))} Or {history.restraint}."
        yield Alarm("kl_budget", "warning", seen, advice)


def _idle_kl(trained: Sequence[Snapshot], history: History) -> Iterator[Alarm]:
    known = [(item, item.kl, item.heldout_reward) for item in trained if item.kl and item.heldout_reward]
    if len(known) < 2:
        return
    best, best_kl, best_reward = max(known, key=lambda row: row[2][0])
    last, kl, reward = known[-1]
    change = last.heldout_changes.get(best.iteration)
    fell = reward[2] < best_reward[0] if change is None else change[2] < 0
    if kl > KL_GROWTH * best_kl and fell:
        seen = (
            f"since iteration {best.iteration} the KL to the base grew from {best_kl:.3g} to {kl:.3g} nats "
            "per image and the held-out reward fell."
        )
        advice = f"Iteration {best.iteration} is the better model. {use_iterate(history.run, best.iteration)}"
        yield Alarm("kl_without_return", "warning", seen, advice)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
