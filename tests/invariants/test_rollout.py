"""Methods on trajectories through real runs: killed anywhere, split anyhow, on one process or two, the result is the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from diffexpo import assembly
from diffexpo.cli.progress import Console
from diffexpo.config import load_config
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError
from tests.invariants.conftest import SIGKILL, diffexpo, in_two_processes, kill_when, weights
from tests.tiny import tiny_flow
from tests.world import base_weights, distance

RECIPE = """\
name: tiny
seed: 7
model: {{path: {model}, device: cpu}}
prompts: {{source: {root}/prompts.txt}}
offline: {{source: null}}
explore:
  iterations: 2
  prompts_per_iteration: 4
  images_per_prompt: 2
  batch_size: 4
  sampler: {sampler}
  negatives: {{source: null}}
rewards:
  - {{name: brightness, type: python, path: "{root}/rewards.py:brightness"}}
algorithm: {algorithm}
training:
  steps: 4
  batch_size: 8
  micro_batch_size: 4
  learning_rate: 1.0e-3
  warmup_fraction: 0.0
  checkpoint_every: 2
evaluation:
  prompts: {root}/heldout.txt
  num_prompts: 2
  sampler: {{name: {evaluated}, steps: 2, guidance: 2.0}}
  judges: [{{name: redness, type: python, path: "{root}/rewards.py:redness"}}]
  kl_prompts: 0
  vendi_prompts: 0
  bootstrap: 100
  grid_prompts: 1
  every_iteration: false
"""
DDIM = "{name: ddim, steps: 3, guidance: 2.0, eta: 1.0}"
SDE = "{name: flow_sde, steps: 3, guidance: 2.0}"
METHODS = {
    "ddpo": ("vp", "{type: ddpo, clip_range: 0.01, min_count: 3}"),
    "flow_grpo": ("flow", "{type: flow_grpo, clip_range: 0.01}"),
    "dpok": ("vp", "{type: dpok, clip_range: 0.01, timestep_fraction: 0.7}"),
    "d3po": ("vp", "{type: d3po}"),
    "prdp": ("vp", "{type: prdp, clip_range: 0.01}"),
    "spo": ("vp", "{type: spo, num_candidates: 2, first_transition: 1, threshold: 0.0}"),
}


@pytest.fixture(scope="session")
def models(world: Path) -> dict[str, Path]:
    return {"vp": world / "model", "flow": tiny_flow(world / "flow")}


def write_recipe(world: Path, models: dict[str, Path], method: str, sampler: str = "") -> Path:
    kind, algorithm = METHODS[method]
    text = RECIPE.format(
        model=models[kind],
        root=world,
        sampler=sampler or (DDIM if kind == "vp" else SDE),
        algorithm=algorithm,
        evaluated="ddim" if kind == "vp" else "flow_euler",
    )
    path = world / f"{method}.yaml"
    path.write_text(text)
    return path


def run(recipe: Path, folder: Path, *settings: str, stop_after: str | None = None) -> Path:
    loaded = load_config([str(recipe)], list(settings))
    assembly.run(
        loaded.config,
        folder,
        sources=loaded.sources,
        resume=folder.exists(),
        console=Console(),
        stop_after=stop_after,
    )
    return folder


@pytest.fixture(scope="module")
def runs(
    world: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """(recipe, folder of an uninterrupted run) by method, made when first asked for."""

    class Runs(dict):
        def __missing__(self, method: str) -> tuple[Path, Path]:
            recipe = write_recipe(world, models, method)
            self[method] = recipe, run(recipe, tmp_path_factory.mktemp(method) / "run")
            return self[method]

    return Runs()


def lines(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in row.items()
            if name != "wall_s" and not name.startswith(("time/", "mem/"))
        }
        for row in rows
    ]


def payloads(folder: Path) -> dict[str, object]:
    """What each stage was completed with, and the checksums of its files."""
    found = {}
    for path in sorted((folder / "store" / "manifests").glob("*.json")):
        body = json.loads(path.read_text())
        timeless = {name: value for name, value in body["payload"].items() if not name.startswith("time/")}
        found[path.name] = (timeless, body["files"])
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_whole_and_leaves_what_it_must(runs, method):
    _, folder = runs[method]
    store = Store(folder / "store")
    stages = {"collect", "train"} | ({"pair"} if method == "d3po" else set())
    assert {(name, t) for name, t in store.completed()} == {(name, t) for name in stages for t in (1, 2)}
    assert [len(store.samples(t)) for t in (1, 2)] == [8, 8]
    one, two = (load_file(folder / "checkpoints" / f"weights-{t:04d}.safetensors") for t in (1, 2))
    assert any(np.abs(one[name] - two[name]).max() > 0 for name in one)
    assert not list((folder / "trajectories").iterdir())
    assert [path.name for path in (folder / "checkpoints").glob("optimizer-*")] == [
        "optimizer-0002.safetensors"
    ]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (folder / "report.html").stat().st_size > 10_000
    first = next(row for row in lines(folder) if row["phase"] == "train")
    if "train/ratio" in first:
        assert first["train/ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "patterns"),
    [
        ("ddpo", ["trajectories/iteration-0002/unit-*", "checkpoints/iteration-0002/checkpoint-*"]),
        ("flow_grpo", ["checkpoints/optimizer-0001.safetensors"]),
    ],
)
def test_kill_9_and_resume_is_bit_identical(runs, tmp_path, method, patterns):
    recipe, truth = runs[method]
    folder = tmp_path / "run"
    arguments = ["run", str(recipe), "--out", str(folder)]
    for pattern in patterns:
        code = kill_when(arguments, lambda pattern=pattern: any(folder.glob(pattern)), SIGKILL)
        assert code == -9, f"the run ended before it could be killed at {pattern}"
        arguments = ["run", "--resume", str(folder)]
    run(recipe, folder)
    assert weights(folder) == weights(truth)
    assert payloads(folder) == payloads(truth)
    assert lines(folder) == lines(truth)


@pytest.mark.parametrize("method", ["dpok", "d3po", "prdp", "spo"])
def test_stage_by_stage_is_bit_identical(runs, tmp_path, method):
    recipe, truth = runs[method]
    for stage in ("collect-1", "train-1", "collect-2", "train-2"):
        folder = run(recipe, tmp_path / "run", stop_after=stage)
    assert weights(folder) == weights(truth)
    assert payloads(folder) == payloads(truth)


def start_of(models, method):
    """The weights that a method's run starts from."""
    is_diffusion = method == "ddpo"
    return base_weights(models["vp" if is_diffusion else "flow"], "unet" if is_diffusion else "transformer")


@pytest.mark.parametrize("micro", [1, 8])
@pytest.mark.parametrize("method", ["ddpo", "flow_grpo"])
def test_micro_batches_do_not_change_the_result(runs, world, models, tmp_path, method, micro):
    recipe, truth = runs[method]
    settings = (f"training.micro_batch_size={micro}", "explore.iterations=1")
    folder = run(recipe, tmp_path / "run", *settings, stop_after="train-1")
    one = load_file(truth / "checkpoints" / "weights-0001.safetensors")
    two = load_file(folder / "checkpoints" / "weights-0001.safetensors")
    difference = np.concatenate([(one[name] - two[name]).ravel() for name in one]).astype(np.float64)
    assert distance(one, two, start_of(models, method)) < 1e-2
    # Weights of up to 1 are rounded by 6e-8 a step.
    assert np.median(np.abs(difference)) < 1e-6


@pytest.mark.parametrize("method", ["ddpo", "flow_grpo"])
def test_two_processes_equal_one(runs, models, tmp_path, method):
    recipe, truth = runs[method]
    folder = tmp_path / "run"
    in_two_processes("run", recipe, "--out", folder, "--stop-after", "train-2")
    rows = [
        {row.sample_id: row.seed_key for row in Store(path / "store").samples(1)} for path in (folder, truth)
    ]
    assert rows[0] == rows[1]
    # In the second iteration images are drawn with weights that differ by rounding.
    for number, bound in ((1, 1e-2), (2, 1e-1)):
        file = f"checkpoints/weights-{number:04d}.safetensors"
        assert (
            distance(*(load_file(path / file) for path in (truth, folder)), start_of(models, method)) < bound
        )


def test_a_sample_is_regenerated_bit_for_bit(runs, tmp_path):
    for method in ("ddpo", "flow_grpo"):
        _, folder = runs[method]
        name = Store(folder / "store").samples(2)[3].sample_id
        assert assembly.regenerate(folder, name, tmp_path / "out.png")["latents"] == "identical"


def test_eta_0_is_refused_before_anything_is_spent(world, models, tmp_path):
    recipe = write_recipe(world, models, "ddpo", "{name: ddim, steps: 3, guidance: 2.0, eta: 0.0}")
    with pytest.raises(ConfigError, match="no density"):
        load_config([str(recipe)], [])
    done = diffexpo("run", str(recipe), "--out", str(tmp_path / "run"), check=False)
    assert done.code == 2 and "no density" in done.err
    assert not (tmp_path / "run").exists()
