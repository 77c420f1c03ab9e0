"""The report's first answer in plain words, from a Summary: sentences quote numbers and compute none."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffexpo.evaluation.metrics import WinRate
from diffexpo.evaluation.summary import EQUAL_COST, Summary
from diffexpo.evaluation.templates import between, digits, percent, points, signed, small


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """`kind` is better, worse, undecided or unknown."""

    kind: str
    title: str
    sentences: list[str]
    tiles: list[Tile] = field(default_factory=list)


def give_verdict(summary: Summary) -> Verdict:
    """Say whether the result is better than the base, at what price, and how offline DPO compares.

    The verdict is `undecided` if one half lies inside the 95% interval, `unknown` if nothing can be compared.
    """
    final, tiles = summary.final or "", _tiles(summary)
    win = summary.wins.get(final)
    if win is None:
        return Verdict("unknown", "No verdict yet", [_why_unknown(summary)], tiles)
    title = {
        "better": "Better than the base model",
        "worse": "Not better: worse than the base model",
        "undecided": "Undecided: no clear difference to the base model",
    }[win.verdict]
    version, (rate, low, high) = summary.method.label(final), map(percent, win.interval)
    first = (
        f"On {win.num_prompts} prompts never trained on, the held-out judge {summary.judge} (also never "
        f"trained on) prefers the images of {version} to the base's in {rate} of comparisons, 95% interval "
        f"{low} to {high} (50% would be no difference; {win.wins} wins, {win.ties} ties, {win.losses} "
        f"losses; exact sign test p {small(win.p_value)})."
    )
    sentences = [*_share_sentence(summary), *_guidance_sentence(summary), first]
    if win.wins == win.losses == 0:
        sentences.append("Every comparison is a tie: to this judge the images of both are equally good.")
    elif win.verdict == "undecided":
        undecided = "The interval contains 50%, so this evaluation cannot tell which is better"
        sentences.append(f"{undecided}; more prompts narrow it.")
    if summary.validation is not None:
        sentences.append(summary.validation.sentence())
    sentences.append(_price(summary))
    if summary.compares_offline:
        sentences.append(_baseline_sentence(summary))
    if not summary.is_finished and summary.planned_iterations is not None:
        done = f"This is {final.replace('-', ' ')} of {summary.planned_iterations} planned"
        sentences.append(f"{done}: the run is not finished.")
    return Verdict(win.verdict, title, sentences, tiles)


def _share_sentence(summary: Summary) -> list[str]:
    """What a judge that tells right from wrong counted, where there is one."""
    if not summary.shares:
        return []
    row, final = summary.shares[0], summary.final or ""
    before, after = percent(row.shares["base"]), percent(row.shares[final])
    change = difference_text(row.change, is_share=True).removesuffix(")")
    text = (
        f"Entirely right under {summary.share_judge}: {before} of the base's images, {after} of those of "
        f"{summary.method.label(final)}, {change}; {row.repaired} repaired, {row.broken} broken)."
    )
    return [text]


def _guidance_sentence(summary: Summary) -> list[str]:
    """What the run has over the base at its best guidance, where several scales were tried."""
    table = summary.contenders
    if table is None or sum(row.is_base for row in table.rows) < 2:
        return []
    best, result = table.best_base, table.result
    gap = difference_text(best.difference, table.is_share) if best.difference else ""
    value = percent(best.value[0]) if table.is_share else digits(best.value[0], 4)
    text = (
        f"Of the base's guidance scales {best.title.partition('guidance ')[2]} is the best on these prompts "
        f"({value}, {best.image_evaluations} network evaluations an image). Against it the difference of "
        f"{result.title}, which takes {result.image_evaluations}, is {gap}; {best.better} images are better, "
        f"{best.worse} worse."
    )
    return [text]


def difference_text(difference: tuple[float, float, float], is_share: bool) -> str:
    """A difference of two scores with its interval: "+5.3 points (95% interval +0.3 to +10.3)"."""
    if is_share:
        return f"{points(difference[0])} points ({between(*difference[1:], points, 'interval ')})"
    return f"{signed(difference[0])} ({between(*difference[1:], signed, 'interval ')})"


def _why_unknown(summary: Summary) -> str:
    if summary.final is None:
        reason = "No iterate has been evaluated yet, so there is nothing to compare."
        return f"{reason} Continue the run with diffexpo run --resume."
    if summary.judge is None:
        reason = "No held-out judge is configured (evaluation.judges), so no win rate can be stated."
        return f"{reason} Train rewards cannot replace it."
    return "The base model or the judge's scores are missing from eval/, so no win rate can be stated."


def _price(summary: Summary) -> str:
    parts = []
    if summary.vendi_change is not None:
        mean, low, high = summary.vendi_change
        words = "no clear change of diversity"
        if low > 0 or high < 0:
            words = f"images of one prompt are more {'alike' if mean < 0 else 'varied'}"
        interval = f"{signed(mean)} ({between(low, high, signed)})"
        parts.append(f"diversity (Vendi score) changed by {interval}: {words}")
    if kl := summary.kl.get(summary.final or ""):
        interval = f"{between(*kl[1:])}; path KL"
        parts.append(f"the distance to the base is {digits(kl[0])} nats per image ({interval})")
    return "What it cost: " + "; ".join(parts) + "." if parts else "Diversity and KL were not measured."


def _baseline_sentence(summary: Summary) -> str:
    win, name = summary.against_baseline, summary.method.name
    if win is None:
        return "No offline-DPO baseline was evaluated, so this report cannot say what the online part adds."
    rate, low, high = map(percent, win.interval)
    outcome = {
        "better": f"{name} beats offline DPO",
        "worse": f"Offline DPO is better than {name} here",
        "undecided": f"{name} and offline DPO cannot be told apart here",
    }[win.verdict]
    numbers = f"(win rate {rate}, 95% interval {low} to {high}, {win.ties} ties)"
    return f"{outcome} {numbers}, {equal_cost(summary)}."


def equal_cost(summary: Summary) -> str:
    """Whether both methods spent the same number of network evaluations, in words."""
    if not summary.method_cost or not summary.baseline_cost:
        return "cost not recorded for both, so whether it was equal is unknown"
    ratio = summary.baseline_cost / summary.method_cost
    counts = f"{summary.method_cost:,.0f} against {summary.baseline_cost:,.0f}"
    if abs(ratio - 1) <= EQUAL_COST:
        return f"at equal network evaluations ({counts})"
    return f"but at unequal cost: {counts} network evaluations, so this is not a fair comparison"


def _tiles(summary: Summary) -> list[Tile]:
    name, final = summary.method.name, summary.final or ""
    tiles = []
    if summary.shares:
        row = summary.shares[0]
        value = f"{percent(row.shares['base'])} \u2192 {percent(row.shares[final])}"
        tiles.append(Tile("Entirely right", value, f"{row.repaired} repaired, {row.broken} broken"))
    tiles += [_rate_tile("Win rate vs base", summary.wins.get(final), "not available")]
    base, last = summary.vendi.get("base"), summary.vendi.get(final)
    value, detail = "-", "not measured"
    if base is not None and last is not None:
        value, detail = f"{base[0]:.2f} \u2192 {last[0]:.2f}", f"base \u2192 {name}, higher is more varied"
    tiles.append(Tile("Diversity (Vendi)", value, detail))
    value, detail = "-", "not measured"
    if final in summary.kl:
        value, interval = digits(summary.kl[final][0]), between(*summary.kl[final][1:])
        detail = f"nats per image, {interval}"
    tiles.append(Tile("KL to the base", value, detail))
    if summary.compares_offline:
        tiles.append(_rate_tile(f"{name} vs offline DPO", summary.against_baseline, "no baseline"))
    return tiles


def _rate_tile(title: str, win: WinRate | None, absent: str) -> Tile:
    if win is None:
        return Tile(title, "-", absent)
    rate, low, high = map(percent, win.interval)
    return Tile(title, rate, f"95%: {low} to {high}")
