"""Every method on the accelerator, from the first collection to the last step: the CPU's weights, and one wait a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.device import pretend
from tests.invariants.every_method import METHODS, run
from tests.invariants.test_every_split import ITERATIONS, assert_same_run

STEP = "training/engine.py _take_step"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_ends_with_the_weights_of_the_cpu_and_waits_once_a_step(
    name: str, device: torch.device, tmp_path: Path
) -> None:
    run(name, tmp_path / "cpu")
    with pretend.counted_waits() as waits:
        loop = run(name, tmp_path / "device", device=device)
    assert_same_run(tmp_path / "device" / name, tmp_path / "cpu" / name)

    settings = loop.config.algorithm
    lines = (tmp_path / "device" / name / "metrics.jsonl").read_text().splitlines()
    steps = sum("train/lr" in json.loads(line) for line in lines)
    assert steps >= loop.config.training.steps
    in_steps: dict[str, int] = {}
    for wait, count in waits.items():
        if STEP in wait.callers:
            in_steps[wait.place] = in_steps.get(wait.place, 0) + count
    expected = {"training/engine.py _merge": steps}
    if settings.measures_batch:
        expected["training/engine.py _measured"] = steps
    assert in_steps == expected


def test_a_unit_of_images_waits_for_its_latents_its_scores_and_nothing_else(
    device: torch.device, tmp_path: Path
) -> None:
    with pretend.counted_waits() as waits:
        loop = run("expo", tmp_path, device=device)
    units = len({(row.iteration, row.unit) for number in ITERATIONS for row in loop.store.collected(number)})
    assert units >= 4
    found: dict[str, int] = {}
    for wait, count in waits.items():
        if "online/units.py collect" in wait.callers or "rewards/scoring.py score_drawn" in wait.callers:
            found[wait.place] = found.get(wait.place, 0) + count
    texts = found.pop("types.py moved", 0)
    assert found == {
        "data/latents.py host_array": units,
        "rewards/scoring.py _broken_rows": units,
        "rewards/python_file.py score": units,
    }
    assert texts <= len(loop.prompts) + 1  # each is encoded once
