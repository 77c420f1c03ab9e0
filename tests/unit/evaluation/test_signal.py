"""What the report says of the signal of one draw, in numbers that follow from the lines of metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from diffexpo.evaluation.report import write_report
from diffexpo.evaluation.signal import signal_sentences
from diffexpo.training.metrics import read_metrics
from tests.unit.evaluation.synthetic_run import make_run, write_lines


def line(iteration: int, **values: object) -> dict[str, object]:
    return {"iteration": iteration, "step": None, "phase": "train_summary"} | values


def measured(moment: str, ratio: float | None, low: float, high: float) -> dict[str, object]:
    values = {"ratio": ratio, "low": low, "high": high, "pairs": 23}
    return {f"signal/{moment}/{name}": value for name, value in values.items()}


def test_share_and_number_of_draws_follow_from_the_ratio() -> None:
    start, end = measured("start", 0.5, 0.4, 0.6), measured("end", 0.25, 0.125, 0.5)
    sentences = signal_sentences([line(1, **start, **end, **{"signal/end/logit_noise": 0.8})], draws=4)
    assert sentences[0] == (
        "In iteration 1, before its first step, one draw's margin was 20.0% signal (signal to noise 0.500, 95% "
        "interval 0.400 to 0.600, 23 pairs): 4.0 draws of a pair would be needed for a ratio of 1."
    )
    assert "what training had changed of one draw's margin was 5.9% signal" in sentences[1]
    assert sentences[1].endswith(": 16 draws of a pair would be needed for a ratio of 1.")
    assert "noise of one draw was then 0.800" in sentences[2] and "This run averages 4" in sentences[2]


def test_the_first_start_and_the_last_end_are_told() -> None:
    lines = [
        line(number, **measured("start", 0.1 * number, 0, 1), **measured("end", 0.2 * number, 0, 1))
        for number in (1, 2, 3)
    ]
    sentences = signal_sentences(lines, draws=1)
    assert [sentence[:15] for sentence in sentences] == ["In iteration 1,", "In iteration 3,"]


def test_no_signal_is_said_with_what_the_interval_allows() -> None:
    text = signal_sentences([line(1, **measured("start", 0.0, 0.0, 0.1))], draws=1)[0]
    assert "0.0% signal" in text and "at least 100 draws of a pair" in text
    text = signal_sentences([line(1, **measured("start", 0.0, 0.0, 0.0))], draws=1)[0]
    assert "more draws than can be told" in text


def test_a_run_without_the_measurement_says_nothing() -> None:
    assert signal_sentences([line(1), line(2, **measured("end", None, 0, 1))], draws=1) == []


def test_the_page_has_the_sentences_where_something_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "Signal of one draw" not in write_report(run).read_text(encoding="utf-8")
    lines = read_metrics(run / "metrics.jsonl")
    for each in lines:
        if each["phase"] == "train_summary":
            each |= measured("end", 0.25, 0.125, 0.5)
    write_lines(run / "metrics.jsonl", lines)
    text = write_report(run).read_text(encoding="utf-8")
    assert "Signal of one draw" in text and "16 draws of a pair would be needed" in text
