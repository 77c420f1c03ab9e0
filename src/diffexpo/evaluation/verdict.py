"""The report's first answer in plain words, from a Summary. No number is made here; every sentence quotes
one."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffexpo.evaluation.summary import EQUAL_COST, Summary


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
    """Say whether the last iterate is better than the base, at what price, and how offline DPO compares.

    Args:
        summary: Numbers of the run.
    Returns:
        A Verdict; `undecided` whenever one half lies inside the 95% interval, `unknown` if nothing can be
        compared.
    """
    tiles = [_win_tile(summary), _vendi_tile(summary), _kl_tile(summary)]
    if summary.compares_offline:
        tiles.append(_baseline_tile(summary))
    win = summary.wins.get(summary.final or "")
    if win is None:
        return Verdict("unknown", "No verdict yet", [_why_unknown(summary)], tiles)
    version = summary.method.label(summary.final)
    title = {
        "better": "Better than the base model",
        "worse": "Not better: worse than the base model",
        "undecided": "Undecided: no clear difference to the base model",
    }[win.verdict]
    first = (
        f"On {win.num_prompts} prompts never trained on, the held-out judge {summary.judge} (also never "
        f"trained on) prefers the "
        f"images of {version} to the base's in {percent(win.rate)} of comparisons, 95% interval "
        f"{percent(win.low)} to "
        f"{percent(win.high)} (50% would be no difference; {win.wins} wins, {win.ties} ties, {win.losses} "
        f"losses; exact sign test "
        f"p {small(win.p_value)})."
    )
    sentences = [first]
    if win.verdict == "undecided":
        sentences.append(
            "The interval contains 50%, so this evaluation cannot tell which is better; more prompts narrow "
            "it."
        )
    sentences.append(_price(summary))
    if summary.compares_offline:
        sentences.append(_baseline_sentence(summary))
    if not summary.is_finished and summary.planned_iterations is not None:
        sentences.append(
            f"This is {summary.final.replace('-', ' ')} of {summary.planned_iterations} planned: the run is "
            f"not finished."
        )
    return Verdict(win.verdict, title, sentences, tiles)


def percent(value: float) -> str:
    """0.6625 as 66.2%."""
    return f"{100 * value:.1f}%"


def small(value: float) -> str:
    """A p-value with its sign of relation: "= 0.013" or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def digits(value: float, count: int = 3) -> str:
    """A number with `count` significant digits, trailing zeros kept: 10.0, 0.250, 1230."""
    return f"{value:#.{count}g}".rstrip(".")


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.2f}" if abs(value) >= 0.1 else f"{value:+.2g}"


def _why_unknown(summary: Summary) -> str:
    if summary.final is None:
        return "No iterate has been evaluated yet, so there is nothing to compare. Continue the run with diffexpo run --resume."
    if summary.judge is None:
        return "No held-out judge is configured (evaluation.judges), so no win rate can be stated. Train rewards cannot replace it."
    return "The base model or the judge's scores are missing from eval/, so no win rate can be stated."


def _price(summary: Summary) -> str:
    parts = []
    if summary.vendi_change is not None:
        mean, low, high = summary.vendi_change
        if low <= 0 <= high:
            words = "no clear change of diversity"
        else:
            words = (
                "images of one prompt are more alike" if mean < 0 else "images of one prompt are more varied"
            )
        parts.append(
            f"diversity (Vendi score) changed by {signed(mean)} (95% {signed(low)} to {signed(high)}): "
            f"{words}"
        )
    kl = summary.kl.get(summary.final or "")
    if kl is not None:
        parts.append(
            f"the distance to the base is {digits(kl[0])} nats per image (95% {digits(kl[1])} to "
            f"{digits(kl[2])}; path KL)"
        )
    return "What it cost: " + "; ".join(parts) + "." if parts else "Diversity and KL were not measured."


def _baseline_sentence(summary: Summary) -> str:
    win, name = summary.against_baseline, summary.method.name
    if win is None:
        return "No offline-DPO baseline was evaluated, so this report cannot say what the online part adds."
    numbers = f"win rate {percent(win.rate)}, 95% interval {percent(win.low)} to {percent(win.high)}, {win.ties} ties"
    if win.verdict == "better":
        outcome = f"{name} beats offline DPO ({numbers})"
    elif win.verdict == "worse":
        outcome = f"Offline DPO is better than {name} here ({numbers})"
    else:
        outcome = f"{name} and offline DPO cannot be told apart here ({numbers})"
    return f"{outcome}, {equal_cost(summary)}."


def equal_cost(summary: Summary) -> str:
    """Whether both methods spent the same number of network evaluations, in words."""
    if not summary.method_cost or not summary.baseline_cost:
        return "cost not recorded for both, so whether it was equal is unknown"
    ratio = summary.baseline_cost / summary.method_cost
    counts = f"{summary.method_cost:,.0f} against {summary.baseline_cost:,.0f}"
    if abs(ratio - 1) <= EQUAL_COST:
        return f"at equal network evaluations ({counts})"
    return f"but at unequal cost: {counts} network evaluations, so this is not a fair comparison"


def _win_tile(summary: Summary) -> Tile:
    win = summary.wins.get(summary.final or "")
    if win is None:
        return Tile("Win rate vs base", "-", "not available")
    return Tile("Win rate vs base", percent(win.rate), f"95%: {percent(win.low)} to {percent(win.high)}")


def _vendi_tile(summary: Summary) -> Tile:
    base, last = summary.vendi.get("base"), summary.vendi.get(summary.final or "")
    if base is None or last is None:
        return Tile("Diversity (Vendi)", "-", "not measured")
    detail = f"base \u2192 {summary.method.name}, higher is more varied"
    return Tile("Diversity (Vendi)", f"{base[0]:.2f} \u2192 {last[0]:.2f}", detail)


def _kl_tile(summary: Summary) -> Tile:
    kl = summary.kl.get(summary.final or "")
    if kl is None:
        return Tile("KL to the base", "-", "not measured")
    return Tile("KL to the base", digits(kl[0]), f"nats per image, 95%: {digits(kl[1])} to {digits(kl[2])}")


def _baseline_tile(summary: Summary) -> Tile:
    win, title = summary.against_baseline, f"{summary.method.name} vs offline DPO"
    if win is None:
        return Tile(title, "-", "no baseline")
    return Tile(title, percent(win.rate), f"95%: {percent(win.low)} to {percent(win.high)}")
