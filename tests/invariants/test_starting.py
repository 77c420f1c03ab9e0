"""A run that starts where another one ended, while the base stays the reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from diffexpo import assembly
from diffexpo.assembly.actions import load_weights, open_run, regenerate
from diffexpo.assembly.starting import check_start, guidance_of_start
from diffexpo.cli.progress import Console
from diffexpo.config import RunConfig, load_config
from diffexpo.data.store import Store
from diffexpo.errors import ConfigError, MissingError
from diffexpo.training.checkpoint import read_tensors
from diffexpo.training.metrics import read_metrics
from tests.invariants.conftest import weights

QUICK = ["evaluation.kl_prompts=0", "evaluation.every_iteration=false", "training.steps=2"]
OFFLINE = [*QUICK, "explore.iterations=1", "algorithm={type: diffusion_dpo, beta: 200.0}"]


def configured(world: Path, *settings: str) -> RunConfig:
    return load_config([str(world / "recipe.yaml")], settings).config


def run(world: Path, folder: Path, *settings: str, stop_after: str | None = None) -> Path:
    loaded = load_config([str(world / "recipe.yaml")], settings)
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
def earlier(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose model is not the base any more."""
    return run(world, tmp_path_factory.mktemp("earlier") / "run", *OFFLINE, "training.learning_rate=1e-2")


@pytest.mark.parametrize("source", ["run", "export"])
def test_training_starts_there_and_the_base_stays_the_reference(
    world: Path, earlier: Path, tmp_path: Path, source: str
) -> None:
    start = earlier if source == "run" else earlier / "export"
    folder = run(world, tmp_path / "run", *OFFLINE, f"tuning.start={start}", stop_after="train-1")
    ended = read_tensors(earlier / "checkpoints" / "weights-0001.safetensors")
    kept = read_tensors(folder / "checkpoints" / "weights-0000.safetensors")
    assert ended.keys() == kept.keys() and all(torch.equal(ended[name], kept[name]) for name in ended)
    first = next(line for line in read_metrics(folder / "metrics.jsonl") if line["phase"] == "train")
    # Where the start is the base, both are exactly 0.
    assert first["train/margin"] != 0
    assert first["train/winner_error"] != first["train/winner_reference_error"]
    _, _, policy = open_run(folder)
    assert policy.weights.fingerprint("base") == open_run(earlier)[2].weights.fingerprint("base")
    load_weights(folder, policy, 0, "current")
    assert all(torch.equal(value, ended[name]) for name, value in policy.weights.state("current").items())


def test_agents_draw_from_the_start_and_a_resumed_run_does_not_need_its_source(
    world: Path, earlier: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(earlier, tmp_path / "copy")
    settings = [*QUICK, "explore.iterations=2", "offline.source=null", f"tuning.start={copy}"]
    truth = run(world, tmp_path / "truth", *settings, stop_after="train-2")
    folder = run(world, tmp_path / "run", *settings, stop_after="train-1")
    shutil.rmtree(copy)
    run(world, folder, *settings, stop_after="train-2")
    assert weights(folder) == weights(truth)
    row = Store(folder / "store", create=False).samples(1)[0]
    assert row.agent in ("main", "exploration")
    assert regenerate(folder, row.sample_id, tmp_path / "again.png")["latents"] == "identical"
    # Without offline pairs iteration 1 trains nothing: what it keeps is the start, not the base.
    kept, first = (
        read_tensors(folder / "checkpoints" / f"weights-000{number}.safetensors") for number in (0, 1)
    )
    assert all(torch.equal(kept[name], first[name]) for name in kept)


def test_adapters_start_from_adapters_of_the_same_scale(world: Path, earlier: Path, tmp_path: Path) -> None:
    lora = ["tuning.kind=lora", "tuning.lora.rank=2"]
    first = run(world, tmp_path / "first", *OFFLINE, *lora, stop_after="train-1")
    second = run(world, tmp_path / "second", *OFFLINE, *lora, f"tuning.start={first}", stop_after="train-1")
    ended = read_tensors(first / "checkpoints" / "weights-0001.safetensors")
    kept = read_tensors(second / "checkpoints" / "weights-0000.safetensors")
    assert all(torch.equal(ended[name], kept[name]) for name in ended)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(earlier / "config.yaml", tmp_path / "unfinished")
    for settings, error, words in (
        ([*lora, f"tuning.start={earlier}"], ConfigError, "tuning.kind = full, this one lora"),
        ([*lora, f"tuning.start={earlier / 'export'}"], ConfigError, "starts from adapters"),
        ([*lora, "tuning.lora.alpha=4", f"tuning.start={first}"], ConfigError, "alpha / rank = 1, here by 2"),
        ([f"tuning.start={first}"], ConfigError, "expected the same kind"),
        ([f"tuning.start={tmp_path / 'none'}"], MissingError, "does not exist"),
        ([f"tuning.start={tmp_path / 'empty'}"], ConfigError, "neither a run"),
        ([f"tuning.start={tmp_path / 'unfinished'}"], MissingError, "diffexpo run --resume"),
    ):
        with pytest.raises(error, match=words):
            check_start(configured(world, *settings))
    with pytest.raises(ConfigError, match="tuning.lora.rank = 2, here 3; expected the same rank"):
        run(world, tmp_path / "third", *OFFLINE, *lora, "tuning.lora.rank=3", f"tuning.start={first}")
    assert not (tmp_path / "third").exists()


G = 3.0
UNGUIDED = ["explore.sampler.guidance=1", "evaluation.sampler.guidance=1", "explore.negatives.source=null"]
DISTIL = [
    *QUICK,
    *UNGUIDED,
    "offline.source=null",
    "rewards=[]",
    "explore.agents=1",
    "explore.iterations=2",
    f"explore.sampler.guidance={G}",
    f"algorithm={{type: guidance_distillation, guidance: {G}}}",
    "explore.prompts_per_iteration=8",
    "training={learning_rate: 1e-3, steps: 40, batch_size: 16, micro_batch_size: 16}",
]


class Told(Console):
    """A console that remembers its warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def warnings_of(world: Path, folder: Path, *settings: str) -> list[str]:
    """What a new run warns of until its first stage."""
    loaded, console = load_config([str(world / "recipe.yaml")], settings), Told()
    options = {"sources": loaded.sources, "resume": False, "console": console}
    assembly.run(loaded.config, folder, stop_after="train-1", **options)
    return console.warnings


@pytest.fixture(scope="module")
def distilled(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learned to draw without guidance as its base draws with it."""
    return run(world, tmp_path_factory.mktemp("distilled") / "run", *DISTIL)


def test_images_of_the_base_are_drawn_again_whatever_training_started_from(
    world: Path, earlier: Path, distilled: Path, tmp_path: Path
) -> None:
    moved = run(world, tmp_path / "moved", *DISTIL, f"tuning.start={earlier}", stop_after="collect-1")
    lora = ["tuning.kind=lora", "tuning.lora.rank=2"]
    adapters = run(world, tmp_path / "adapters", *DISTIL, *lora, stop_after="train-2")
    for folder in (distilled, moved, adapters):
        row = Store(folder / "store", create=False).samples(1)[0]
        assert row.agent == "base" and row.sampler_settings["guidance"] == G and row.scores == {}
        assert regenerate(folder, row.sample_id, tmp_path / "again.png")["latents"] == "identical"
    rows = [Store(folder / "store", create=False).samples(1) for folder in (distilled, moved)]
    assert [row.weights for row in rows[0]] == [row.weights for row in rows[1]]


def test_expo_starts_from_distilled_guidance_and_base_means_the_model_before_it(
    world: Path, distilled: Path, tmp_path: Path
) -> None:
    """Reference `base` and the anchor are the base of `model.path`, guided at `anchor_guidance`; `previous` is
    the distilled start."""
    start = [*QUICK, *UNGUIDED, "explore.iterations=2", "offline.source=null", f"tuning.start={distilled}"]
    held = "alpha: 0.0, beta: 200.0, anchor_weight: 0.1, empty_prompt_fraction: 0.0"
    first = {}
    for name, settings in {
        "base": f"reference: base, anchor_guidance: {G}",
        "unguided": "reference: base, anchor_guidance: 1.0",
        "previous": f"reference: previous, anchor_guidance: {G}",
    }.items():
        algorithm = f"algorithm={{type: expo, {held}, {settings}}}"
        folder = run(world, tmp_path / name, *start, algorithm, stop_after="train-2")
        lines = read_metrics(folder / "metrics.jsonl")
        first[name] = next(line for line in lines if line["phase"] == "train")
        policy = open_run(folder)[2]
        assert policy.weights.fingerprint("base") == open_run(distilled)[2].weights.fingerprint("base")
    # The start is nearer to the guided base than to the base, and no reference moves the anchor.
    assert first["base"]["train/anchor_distance"] < 0.5 * first["unguided"]["train/anchor_distance"]
    anchors = [first[name]["train/anchor_distance"] for name in ("base", "previous")]
    assert anchors[0] == pytest.approx(anchors[1], rel=1e-5)
    # Measured against the base the margin is not 0 at the start, against the start it is.
    assert first["base"]["train/margin"] != 0 and first["previous"]["train/margin"] == 0
    assert first["base"]["train/common_part"] != 0 and first["previous"]["train/common_part"] == 0


def test_a_run_from_distilled_guidance_is_warned_where_it_guides_again(
    world: Path, distilled: Path, tmp_path: Path
) -> None:
    start = [*QUICK, *UNGUIDED, "offline.source=null", "explore.iterations=2", f"tuning.start={distilled}"]
    assert warnings_of(world, tmp_path / "plain", *start) == []
    (guided,) = warnings_of(world, tmp_path / "guided", *start, "evaluation.sampler.guidance=2")
    assert "evaluation.sampler.guidance = 2: the run of tuning.start has taught" in guided
    # So does a run that started there, and a folder that is gone says nothing.
    loaded = configured(world, *UNGUIDED, f"tuning.start={tmp_path / 'plain'}")
    assert guidance_of_start(loaded) == G
    assert guidance_of_start(configured(world, f"tuning.start={tmp_path / 'gone'}")) == 1.0
