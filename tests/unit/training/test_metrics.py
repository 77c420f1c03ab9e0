"""The metrics file survives crashes and repeated stages."""

import errno
import json
import os
from pathlib import Path

import pytest

from diffexpo.errors import DataError, DiffexpoError
from diffexpo.training.metrics import MetricsWriter, damaged_path, read_metrics, sound_metrics, sums_path


def steps(path: Path) -> list[tuple[int, int | None, str]]:
    return [(line["iteration"], line["step"], line["phase"]) for line in read_metrics(path)]


def test_lines_hold_the_fields_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    MetricsWriter(path).write(
        1, 2, "train", {"train/loss": 0.1 + 0.2, "train/grad_norm": float("nan"), "n": 3}
    )
    line = json.loads(path.read_text())
    assert line.pop("wall_s") >= 0
    expected = {
        "iteration": 1,
        "step": 2,
        "phase": "train",
        "train/loss": 0.1 + 0.2,
        "train/grad_norm": None,
        "n": 3,
    }
    assert line == expected


@pytest.mark.parametrize("tail", [b"{", b'{"iteration": 1}', b"\x00\x00\x00\n"])
def test_a_torn_tail_is_removed_on_opening(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsWriter(path).write(1, 1, "train", {})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert steps(path) == [(1, 1, "train")]
    MetricsWriter(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b"{}{}\n", b'{"iteration": 1}\n', b"\xff\n", b"[1]\n", b"[" * 100_000 + b"\n"]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_is_named_and_kept_aside_and_the_others_stay(
    tmp_path: Path, line: bytes, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, 1, "train", {})
    writer.write_once(1, "collect", {})
    sound = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*sound[:place], line, *sound[place:]]))
    with pytest.raises(DataError, match=f"line {place + 1}: expected a JSON object"):
        read_metrics(path)
    rows, problems = sound_metrics(path)
    assert len(rows) == 2 and len(problems) == 1
    writer = MetricsWriter(path)
    assert path.read_bytes() == b"".join(sound) and damaged_path(path).read_bytes() == line
    assert f"line {place + 1} is damaged, kept aside in metrics.jsonl.damaged" in caplog.text
    writer.write_once(1, "collect", {})
    assert len(read_metrics(path)) == 2, "what is sound is still known"
    assert "has lost 1 damaged lines" in sound_metrics(path)[1][0]


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A file of four lines."""
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in range(4):
        writer.write(1, step, "train", {"a": 1.5})
    writer.sync()
    return writer.path


def test_a_changed_digit_is_a_damaged_line(four: Path) -> None:
    data = four.read_bytes()
    four.write_bytes(data.replace(b"1.5", b"1.7", 1))
    rows, problems = sound_metrics(four)
    assert [row["step"] for row in rows] == [1, 2, 3] and len(problems) == 1
    assert "line 1: " in problems[0] and "checksum" in problems[0]


@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2], [1, 2, 3], [0, 3]])
def test_lines_that_are_lost_are_counted_and_stay_known(
    kept: list[int], four: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = four.read_bytes().splitlines(keepends=True)
    four.write_bytes(b"".join(lines[number] for number in kept))
    rows, problems = sound_metrics(four)
    assert [row["step"] for row in rows] == kept
    lost = {1: "1 line is lost"}.get(4 - len(kept), f"{4 - len(kept)} lines are lost")
    assert len(problems) == 1 and lost in problems[0]
    MetricsWriter(four).write(1, 4, "train", {})
    assert lost in caplog.text
    rows, problems = sound_metrics(four)
    assert [row["step"] for row in rows] == [*kept, 4]
    assert len(problems) == 1 and f"has lost {4 - len(kept)} damaged lines" in problems[0]


@pytest.mark.parametrize("left", [0, 1, 2, 3])
@pytest.mark.parametrize("torn", ["", "abc"])
def test_lines_whose_sums_a_crash_left_unwritten_count(left: int, torn: str, four: Path) -> None:
    sums = sums_path(four)
    written = sums.read_text()
    sums.write_text(written[: 9 * left] + torn)
    assert [row["step"] for row in read_metrics(four)] == [0, 1, 2, 3]
    MetricsWriter(four)
    assert sums.read_text() == written and not damaged_path(four).exists()


def test_a_line_without_a_sum_beside_a_sum_without_a_line_is_damaged(four: Path) -> None:
    sums_path(four).write_text(sums_path(four).read_text()[:27] + "00000000\n")
    rows, problems = sound_metrics(four)
    assert len(rows) == 3 and len(problems) == 1 and "line 4: " in problems[0]


@pytest.mark.parametrize("kept", [4, 5])
def test_a_power_cut_takes_lines_that_were_not_synced_and_says_nothing(kept: int, four: Path) -> None:
    writer = MetricsWriter(four)
    for step in (4, 5):
        writer.write(1, step, "train", {})
    four.write_bytes(b"".join(four.read_bytes().splitlines(keepends=True)[:kept]))
    assert [row["step"] for row in read_metrics(four)] == list(range(kept))
    MetricsWriter(four)
    assert not damaged_path(four).exists() and sums_path(four).read_bytes().count(b"\n") == kept + 1
    four.write_bytes(b"".join(four.read_bytes().splitlines(keepends=True)[:3]))
    assert {4: "1 line is lost", 5: "2 lines are lost"}[kept] in sound_metrics(four)[1][0]


def test_a_file_without_sums_is_read_and_gets_them(four: Path) -> None:
    written = sums_path(four).read_text()
    sums_path(four).unlink()
    assert len(read_metrics(four)) == 4
    MetricsWriter(four)
    assert sums_path(four).read_text() == written


def test_a_rewind_that_was_broken_off_is_no_loss(four: Path) -> None:
    """Sums are taken back first; a crash before the lines leaves them without sums."""
    sums = sums_path(four)
    sums.write_text(sums.read_text()[: 9 * 2])
    writer = MetricsWriter(four)
    assert writer.rewind(1, 1) == 2
    assert [row["step"] for row in read_metrics(four)] == [0, 1] and not damaged_path(four).exists()


def test_a_phase_is_written_once_even_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        writer = MetricsWriter(path)
        writer.write_once(1, "collect", {"a": 1})
        writer.write_once(1, "collect", {"a": 2})
        writer.write_once(2, "collect", {"a": 3})
    assert [line["a"] for line in read_metrics(path)] == [1, 3]


def test_rewind_cuts_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for iteration in (1, 2):
        for step in (1, 2, 3):
            writer.write(iteration, step, "train", {})
        writer.write_once(iteration, "train_summary", {})
    assert writer.rewind(3, 0) == 0 and writer.rewind(2, 3) == 0
    assert writer.rewind(2, 1) == 3
    assert steps(path)[-2:] == [(1, None, "train_summary"), (2, 1, "train")]
    writer.write_once(2, "train_summary", {})
    assert steps(path)[-1] == (2, None, "train_summary")
    writer.write_once(2, "collect", {})
    assert writer.rewind(1, 0) == 4
    assert steps(path) == [(2, 1, "train"), (2, None, "train_summary"), (2, None, "collect")]


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.path.unlink()
    writer.path.symlink_to("/dev/full")
    with pytest.raises(DiffexpoError, match=os.strerror(errno.ENOSPC)):
        writer.write(1, 1, "train", {})


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "none" / "metrics.jsonl", active=False)
    writer.write(1, 1, "train", {})
    writer.write_once(1, "train", {})
    assert writer.rewind(1, 0) == 0
    writer.sync()
    assert list(tmp_path.iterdir()) == []
