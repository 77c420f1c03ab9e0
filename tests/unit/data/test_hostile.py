"""A sample of the hostile inputs: our own errors only, nothing accepted silently, time and memory bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import hostile_inputs as hostile


def test_hostile_inputs_end_in_our_errors_or_are_counted() -> None:
    rows = hostile.run(24, seed=1, limit_s=60.0)
    assert [row["way"] for row in rows] == ["read", "import"] * 24
    assert [(row["name"], row["violations"]) for row in rows if row["violations"]] == []
    assert {"read", "ImportFormatError"} <= {row["outcome"] for row in rows}


def test_inputs_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def made(folder: str) -> list[tuple[str, bytes]]:
        cases = list(hostile.make_inputs(tmp_path / folder, 12, seed=5))
        return [(c.name, Path(c.path).read_bytes() if Path(c.path).is_file() else b"") for c in cases]

    assert made("a") == made("b")


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        ({"outcome": "CRASH ZeroDivisionError: x"}, "CRASH ZeroDivisionError: x"),
        ({"outcome": "HANG beyond 20 s"}, "HANG beyond 20 s"),
        ({"kept": 6}, "6 pairs kept, 5 are good"),
        ({"growth": 2**30}, "memory grew by 1024 MiB"),
        ({"quarantined": {}, "read": 5}, "silently accepted"),
        ({"quarantined": {}}, "6 rows read, 5 counted"),
    ],
)
def test_each_kind_of_violation_is_seen(change: dict[str, object], violation: str) -> None:
    case = hostile.Case("x", "pickapic", "x", most_kept=5, must_complain=True)
    report = {"read": 6, "kept": 5, "ties": 0, "unlabelled": 0, "unselected": 0, "quarantined": {"bad": 1}}
    good = {"outcome": "read", "kept": 5, "growth": 0, "report": report}
    assert hostile.violations(case, good, 100 * 2**20) == []
    inner = {name: value for name, value in change.items() if name in report and name != "kept"}
    outer = {name: value for name, value in change.items() if name not in inner}
    assert violation in hostile.violations(case, good | outer | {"report": report | inner}, 100 * 2**20)
