"""The notebook of examples/, run from its first cell to its last as Jupyter would."""

from __future__ import annotations

import ast
import json
import linecache
import time
from pathlib import Path

import pytest

import diffexpo
from tests.commands import ROOT

NOTEBOOK = ROOT / "examples" / "first_run.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def run_cell(source: str, name: str, names: dict[str, object]) -> object:
    """The value of a cell's last expression, None if it ends with something else."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)  # noqa: S102 (the notebook's own lines)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)


@pytest.mark.timeout(1200)
def test_the_notebook_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # What a notebook defines belongs to __main__, whose own file is none of its.
    names: dict[str, object] = {"__name__": "__main__"}
    began = time.process_time()
    shown = []
    for number, cell in enumerate(CELLS):
        assert not cell.get("outputs"), "outputs are not kept"
        if cell["cell_type"] == "code":
            shown.append(run_cell("".join(cell["source"]), f"cell {number}", names))
    assert time.process_time() - began < 60
    kinds = {type(value).__name__ for value in shown if value is not None}
    assert {"Tensor", "list", "Figure", "Image"} <= kinds
    runs = names["runs"]
    assert isinstance(runs, list) and [run.config.seed for run in runs] == [0, 1]
    for run in runs:
        assert isinstance(run, diffexpo.Run) and run.state == "finished"
        # The loss where policy = reference is the function's own.
        assert run.metrics("train")["train/loss"][0].as_py() == pytest.approx(1.0, abs=1e-4)
        assert run.config.algorithm.type == "python" and "hinge" in run.config.algorithm.path
