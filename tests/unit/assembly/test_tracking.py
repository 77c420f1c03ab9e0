"""Trackers get every line once and every evaluation's images, also when a run is resumed or told again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from diffexpo.assembly.tracking import Feed, track
from diffexpo.config import config_to_yaml, load_config
from diffexpo.errors import MissingError
from diffexpo.training.metrics import read_metrics
from diffexpo.training.tracking import require_tracker
from tests.unit.evaluation.synthetic_run import make_run

CONFIG = load_config(["emoji/quick"], []).config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text(config_to_yaml(CONFIG))
    return folder


def events(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, int]]:
    """Scalars by name as (step, value), and the number of images by name, of the TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tracking"), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {
        name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]
    }
    return scalars, {name: len(found.Images(name)) for name in found.Tags()["images"]}


def test_tensorboard_holds_the_lines_of_the_file_once(run_dir: Path) -> None:
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert track(run_dir, ["tensorboard"]) == {"tensorboard": len(lines)}
    # Once more, and after a resume that cut the file and wrote the same lines again.
    assert track(run_dir, ["tensorboard"]) == {"tensorboard": len(lines)}
    text = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text("".join(text.splitlines(keepends=True)[:5]))
    feed = Feed(CONFIG, run_dir, ["tensorboard"], "diffexpo")
    (run_dir / "metrics.jsonl").write_text(text)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"iteration": 9, "step": None, "phase": "pair", "wall_s": 0, "pairs/count": 3}) + "\n"
        )
    feed.line({})
    feed.close()
    scalars, images = events(run_dir)
    losses = [
        (n, line["train/loss"]) for n, line in enumerate(lines, 1) if line.get("train/loss") is not None
    ]
    assert [step for step, _ in scalars["train/loss"]] == [step for step, _ in losses]
    np.testing.assert_allclose([v for _, v in scalars["train/loss"]], [v for _, v in losses], rtol=1e-6)
    assert scalars["pairs/count"][-1] == (len(lines) + 1, 3.0)
    versions = {folder.name for folder in (run_dir / "eval").iterdir() if (folder / "suite.json").is_file()}
    assert {name.split("/")[1] for name in images} == versions


class Recorder(ModuleType):
    """A stand-in of a tracker's package, with what accelerate calls of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = SimpleNamespace(name=name, loader=None, origin=None, submodule_search_locations=None)
        self.logged: list[tuple[int, dict]] = []
        self.opened: list[dict] = []
        self.files: list[tuple[str, str]] = []
        self.kept: dict = {}


def wandb_stand_in() -> Recorder:
    module = Recorder("wandb")

    def init(project: str, **options: object) -> SimpleNamespace:
        module.opened.append({"project": project, **options})
        return SimpleNamespace(
            id=options.get("id") or "w1",
            log=lambda values, step: module.logged.append((step, values)),
            finish=lambda: None,
        )

    module.init, module.Image = init, lambda image: image.shape
    module.config = SimpleNamespace(update=lambda values, allow_val_change: module.kept.update(values))
    return module


def mlflow_stand_in() -> Recorder:
    module = Recorder("mlflow")
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.utils = SimpleNamespace(validation=limits)
    module.search_experiments = lambda filter_string: []
    module.create_experiment = lambda name, **more: name
    module.end_run = lambda: None

    def start_run(run_id: str | None, **options: object) -> SimpleNamespace:
        module.opened.append({"id": run_id, **options})
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

    module.start_run = start_run
    module.log_params = module.kept.update
    module.log_metrics = lambda values, step: module.logged.append((step, values))
    module.log_artifact = lambda local_path, artifact_path: module.files.append((artifact_path, local_path))
    return module


@pytest.mark.parametrize(("kind", "make"), [("wandb", wandb_stand_in), ("mlflow", mlflow_stand_in)])
def test_other_trackers_go_on_with_the_run_that_they_began(
    kind: str, make, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make()
    monkeypatch.setitem(sys.modules, kind, module)
    count = len(read_metrics(run_dir / "metrics.jsonl"))
    track(run_dir, [kind], "mine")
    track(run_dir, [kind], "mine")
    assert [one.get("id") for one in module.opened] == [None, {"wandb": "w1", "mlflow": "m1"}[kind]]
    numbers = [step for step, values in module.logged if "run/iteration" in values]
    assert numbers == list(range(1, count + 1))
    assert module.kept["algorithm.type"] == CONFIG.algorithm.type
    images = [values for _, values in module.logged if any(name.startswith("images/") for name in values)]
    assert images or {folder for folder, _ in module.files} >= {"images/base", "images/iteration-1"}


def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingError, match="pip install wandb"):
        require_tracker("wandb")
