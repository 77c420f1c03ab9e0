"""What the report says of the signal in one draw's margin, and of how many draws are worth their cost."""

from __future__ import annotations

from collections.abc import Sequence

from diffexpo.evaluation.records import Json, iteration_of
from diffexpo.evaluation.templates import digits, percent

MOMENTS = {"start": "before its first step", "end": "after its last step"}


def signal_sentences(metrics: Sequence[Json], draws: int) -> list[str]:
    """Sentences on the first measurement of a run, of the policy's own margins, and on the last one, of what
    training changed; none where nothing was measured.

    Args:
        metrics: lines of metrics.jsonl.
        draws: `algorithm.draws` of the run.
    """
    found = [
        (iteration_of(line), moment, line)
        for line in metrics
        for moment in MOMENTS
        if line.get(f"signal/{moment}/ratio") is not None
    ]
    first = next((each for each in found if each[1] == "start"), None)
    last = next((each for each in reversed(found) if each[1] == "end"), None)
    sentences = [_sentence(*each) for each in (first, last) if each is not None]
    noise = last[2].get("signal/end/logit_noise") if last is not None else None
    if noise is not None:
        sentences.append(
            f"In units of the loss's logit the noise of one draw was then {digits(noise)}. The sigmoid "
            "saturates on noise well above 1; below, more draws inside it do little more than a larger batch "
            f"would. This run averages {draws} (algorithm.draws)."
        )
    return sentences


def _sentence(iteration: int, moment: str, line: Json) -> str:
    """How much of a draw's margin is signal, and how many draws would make signal and noise equal."""
    ratio, low, high, pairs = (line[f"signal/{moment}/{name}"] for name in ("ratio", "low", "high", "pairs"))
    what = "what training had changed of one draw's margin" if moment == "end" else "one draw's margin"
    share = percent(ratio**2 / (1 + ratio**2))
    head = (
        f"In iteration {iteration}, {MOMENTS[moment]}, {what} was {share} signal "
        f"(signal to noise {digits(ratio)}, 95% interval {digits(low)} to {digits(high)}, {pairs} pairs)"
    )
    if ratio == 0:
        bound = f"at least {_count(high)} draws" if high > 0 else "more draws than can be told"
        return f"{head}: {bound} of a pair would be needed for a ratio of 1."
    return f"{head}: {_count(ratio)} draws of a pair would be needed for a ratio of 1."


def _count(ratio: float) -> str:
    needed = max(1.0, 1 / ratio**2)
    return f"{needed:,.0f}" if needed >= 10 else f"{needed:.1f}"
