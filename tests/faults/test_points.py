"""Faults at single operations of a run; `benchmarks/faults.py` goes through all of them."""

from __future__ import annotations

import pytest

from tests.faults.points import Bench

POINTS = [
    ("kill", "replace", "inputs.json.tmp", 0),
    ("torn", "write", "store/manifests/pair-0001.json.tmp", 0),
    ("kill", "replace", "report.html", 0),
    ("kill", "replace", "status.json", -1),
    ("ENOSPC", "open", "log.txt", -1),
    ("EDQUOT", "write", "checkpoints/weights-0001.safetensors.tmp", 0),
]
"""A fault, the operation on a file whose name holds a text, and which of them."""


@pytest.mark.parametrize(("kind", "operation", "file", "which"), POINTS)
def test_a_run_survives_a_fault(kind: str, operation: str, file: str, which: int, bench: Bench) -> None:
    listed = bench.operations("whole")
    places = [i for i, line in enumerate(listed) if line.startswith(f"{operation} ") and file in line]
    assert places, f"the run has no {operation} of {file}"
    name = f"{kind}-{operation}-{places[which]}"
    broken = bench.run(name, places[which], kind)
    assert bench.problems(name, kind, broken, bench.folder / "whole") == []
