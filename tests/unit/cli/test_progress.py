"""Plain progress: first and last line always, at most one per ten seconds between; the log keeps everything."""

import io

import pytest

from diffexpo.cli.progress import Console, duration, rate


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def console(clock, **environment):
    stream = io.StringIO()
    return Console(stream, interactive=False, environment=environment, clock=clock), stream


def test_plain_lines_at_start_at_end_and_every_ten_seconds():
    clock = Clock()
    out, stream = console(clock)
    with out.phase("collect 1/2", 100, "images") as phase:
        for _ in range(100):
            clock.now += 0.25
            phase.advance()
    lines = stream.getvalue().splitlines()
    assert lines == [
        "collect 1/2: 100 images",
        "collect 1/2: 40/100 images (40%) 4.0 images/s ETA 15 s",
        "collect 1/2: 80/100 images (80%) 4.0 images/s ETA 5.0 s",
        "collect 1/2: 100 images in 25 s (4.0 images/s)",
    ]


def test_a_phase_that_ends_early_says_where():
    clock = Clock()
    out, stream = console(clock)
    with pytest.raises(KeyboardInterrupt), out.phase("train", 10, "steps") as phase:
        clock.now = 2.0
        phase.advance(4)
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1] == "train: stopped at 4/10 steps in 2.0 s (2.0 steps/s)"


def test_a_phase_of_unknown_length_counts_without_eta():
    clock = Clock()
    out, stream = console(clock)
    with out.phase("import", 0, "pairs") as phase:
        for _ in range(3):
            clock.now += 5.0
            phase.advance(10)
    assert stream.getvalue().splitlines() == [
        "import ...",
        "import: 20 pairs 2.0 pairs/s",
        "import: 30 pairs in 15 s (2.0 pairs/s)",
    ]


def test_the_log_keeps_what_was_said_before_it_was_attached(tmp_path):
    out, _ = console(Clock())
    out.line("first")
    out.attach_log(tmp_path / "run" / "log.txt")
    out.warning("second")
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["first", "warning: second"]


def test_only_the_first_process_speaks(tmp_path):
    out, stream = console(Clock(), RANK="1")
    out.attach_log(tmp_path / "log.txt")
    with out.phase("train", 2, "steps") as phase:
        phase.advance(2)
    assert stream.getvalue() == ""
    assert not (tmp_path / "log.txt").exists()


def test_a_terminal_gets_bars_and_the_log_plain_lines(tmp_path):
    stream = io.StringIO()
    out = Console(stream, interactive=True, environment={"NO_COLOR": "1"}, clock=Clock())
    out.attach_log(tmp_path / "log.txt")
    with out.phase("outer", 2, "iterations") as outer, out.phase("inner", 3, "steps") as inner:
        inner.advance(3)
        out.line("[not markup] said inside")
        outer.advance(2)
    out.warning("careful")
    assert "[not markup] said inside" in stream.getvalue()
    assert "\x1b[33m" not in stream.getvalue(), "NO_COLOR turns colours off"
    log = (tmp_path / "log.txt").read_text()
    assert "inner: 3 steps in" in log
    assert "outer: 2 iterations in" in log


def test_colours_on_a_terminal_without_no_color():
    stream = io.StringIO()
    Console(stream, interactive=True, environment={}).warning("careful")
    assert "\x1b[33m" in stream.getvalue()


def test_tables_align_and_numbers_stand_right():
    out, stream = console(Clock())
    out.table("scores", ["name", "mean"], [("a", 1.0), ("longer", 12.5)])
    assert stream.getvalue().splitlines() == [
        "scores",
        "  name    mean",
        "  ------  ----",
        "  a          1",
        "  longer  12.5",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.6, "1:00"), (75, "1:15"), (3671, "1:01:11")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rates():
    assert [rate(value, "x") for value in (0.123, 1.26, 250.4)] == ["0.12 x/s", "1.3 x/s", "250 x/s"]


@pytest.mark.parametrize("width", [40, 60, 120])
def test_a_narrow_terminal_keeps_count_and_time_left(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    out = Console(stream, interactive=True, environment={"NO_COLOR": "1"})
    with out.phase("evaluate iteration-12 of a long name", 1234, "micro-batches") as phase:
        phase.advance(617)
        out._progress.refresh()
        shown = stream.getvalue().split("\n")[-1].replace("\r", "")
    assert "617/1234" in shown and "ETA" in shown
    assert len(shown.split("\x1b[2K")[-1].rstrip()) <= width
