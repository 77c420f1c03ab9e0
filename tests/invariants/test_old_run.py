"""Run folders that the code of commit e056383 left (old_run/make.py says how) serve today's code: an
interrupted one is resumed, a finished one is reported, exported, inspected, verified and drawn from again.

Other processors round otherwise, so no bits are compared with what was stored, except where they were only
copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load_file

from diffexpo.cli.main import main
from diffexpo.data.store import Store
from diffexpo.training.metrics import read_metrics
from tests.invariants.old_run.make import world as build_world
from tests.world import base_weights, distance

OLD = Path(__file__).parent / "old_run"
Call = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("old"))


@pytest.fixture
def call(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """`diffexpo ARGUMENTS` in a folder that holds the world and both runs; returns what it printed."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    for name in ("whole", "begun"):
        shutil.copytree(OLD / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out

    return run


def test_an_interrupted_run_is_resumed_where_it_stopped(call: Call, tmp_path: Path) -> None:
    call("run", "--resume", "begun")
    begun, whole = tmp_path / "begun", OLD / "whole"
    assert json.loads((begun / "status.json").read_text())["state"] == "finished"
    files = [f"checkpoints/weights-{number:04d}.safetensors" for number in (1, 2)]
    assert (begun / files[0]).read_bytes() == (OLD / "begun" / files[0]).read_bytes(), "it was trained before"
    # Training went on from the second step with the stored moments, pairs and noise, so that only rounding
    # separates the ends: 1e-7 of every product, carried through three steps; a lost moment or another batch
    # would be of the order of 1.
    start, ours, theirs = (
        load_file(OLD / "begun" / files[0]),
        load_file(begun / files[1]),
        load_file(whole / files[1]),
    )
    assert distance(ours, theirs, start) < 1e-2
    lines = [row for row in read_metrics(begun / "metrics.jsonl") if row["phase"] == "train"]
    assert [(row["iteration"], row["step"]) for row in lines] == [
        (i, step) for i in (1, 2) for step in (1, 2, 3, 4)
    ]
    assert (begun / "report.html").stat().st_size > 10_000
    exported = load_file(begun / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(exported[name], value) for name, value in ours.items())


def test_a_finished_run_is_reported_and_exported(call: Call, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    call("report", "whole")
    page = (whole / "report.html").read_text()
    assert len(page) > 10_000 and "redness" in page and "brightness" in page
    call("export", "whole")
    pipeline = StableDiffusionPipeline.from_pretrained(str(whole / "export"))
    learned = load_file(OLD / "whole" / "checkpoints" / "weights-0002.safetensors")
    state = pipeline.unet.state_dict()
    assert state.keys() == learned.keys()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in learned.items())
    assert (
        distance(
            learned,
            load_file(OLD / "whole" / "checkpoints" / "weights-0001.safetensors"),
            base_weights(tmp_path / "model"),
        )
        > 0
    )


def test_its_data_are_inspected_verified_and_exported(call: Call, tmp_path: Path) -> None:
    pairs = Store(tmp_path / "whole" / "store", create=False).pairs()
    assert {pair.source for pair in pairs} == {"offline", "online"}
    found = json.loads(call("data", "inspect", "whole", "--json"))
    assert str(len(pairs)) in json.dumps(found)
    assert "files are as their manifests say" in call("data", "verify", "whole")
    call("data", "export", "whole", "pairs.parquet")
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert sorted(row["caption"] for row in rows) == sorted(pair.prompt for pair in pairs)
    assert all(row["jpg_0"] and row["jpg_1"] for row in rows)


def test_an_image_is_drawn_again_from_its_row(call: Call, tmp_path: Path) -> None:
    rows = Store(tmp_path / "whole" / "store", create=False).samples(1)
    for agent in ("main", "exploration"):
        name = next(row.sample_id for row in rows if row.agent == agent)
        said = call("data", "regenerate", "whole", name, "again.png")
        (line,) = (line for line in said.splitlines() if line.startswith("largest difference"))
        # Two steps of a network in float32 under guidance; the first divides rounding of 1e-6 by alpha of
        # 0.07.
        assert float(line.split(": ")[1]) < 1e-3
        assert (tmp_path / "again.png").stat().st_size > 0
