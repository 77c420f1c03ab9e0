"""What a run reads stays the same while it goes on, and an iterate of a run is a base model for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import diffexpo
from diffexpo.assembly.inputs import check_inputs_unchanged
from diffexpo.config import RunConfig, load_config
from diffexpo.errors import MissingError, ResumeError
from diffexpo.training.distributed import World
from tests.commands import command
from tests.commands import diffexpo as succeed

SETS = ["explore.iterations=2", "training.steps=2", "evaluation.kl_prompts=0", "evaluation.bootstrap=20"]
LORA = ["tuning.kind=lora", "tuning.lora.rank=2", "tuning.lora.alpha=3"]


@pytest.fixture
def moved(world: Path, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A recipe whose files can be changed."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("model", "*.parquet"))
    text = (folder / "recipe.yaml").read_text().replace(f"{world}/", f"{folder}/")
    (folder / "recipe.yaml").write_text(text.replace(str(folder / "model"), str(world / "model")))
    return load_config([folder / "recipe.yaml"], ["offline.source=null"]).config, folder


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("prompts.txt", "prompts.source"),
        ("heldout.txt", "evaluation.prompts"),
        ("negatives.txt", "explore.negatives.source"),
        ("rewards.py", "rewards.0.path"),
    ],
)
def test_a_changed_file_is_refused_by_name(
    name: str, setting: str, moved: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    (config, folder), world = moved, World()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step").touch()  # what has made something is bound to its inputs
    check_inputs_unchanged(config, tmp_path / "run", "weights", world)
    check_inputs_unchanged(config, tmp_path / "run", "weights", world)
    text = (folder / name).read_text()
    (folder / name).write_text(f"# a remark\n\n{text}" if name.endswith(".txt") else text)
    check_inputs_unchanged(config, tmp_path / "run", "weights", world)  # what is read is the same
    (folder / name).write_text(text + ("one more\n" if name.endswith(".txt") else "\nX = 1\n"))
    with pytest.raises(ResumeError, match=f"{setting} = .*{name}.* is not what this run began with"):
        check_inputs_unchanged(config, tmp_path / "run", "weights", world)
    (folder / name).write_text(text)
    check_inputs_unchanged(config, tmp_path / "run", "weights", world)
    with pytest.raises(ResumeError, match="model.path = .* is not what this run began with"):
        check_inputs_unchanged(config, tmp_path / "run", "other weights", world)
    assert Path(json.loads((tmp_path / "run" / "inputs.json").read_text())[setting]["file"]).is_absolute()


def test_a_stopped_run_does_not_go_on_with_other_prompts(moved, tmp_path: Path) -> None:
    _, folder = moved
    sets = [part for setting in [*SETS, "offline.source=null"] for part in ("--set", setting)]
    begin = ("run", folder / "recipe.yaml", "--out", tmp_path / "run", *sets, "--stop-after", "collect-1")
    assert command(*begin).code == 0
    (folder / "prompts.txt").write_text("something else\n")
    done = command("run", "--resume", tmp_path / "run")
    assert done.code == 4 and "prompts.source" in done.message


def test_an_iterate_is_the_base_of_another_run(world: Path, tmp_path: Path) -> None:
    sets = [part for setting in [*SETS, *LORA] for part in ("--set", setting)]
    succeed(
        "run",
        world / "recipe.yaml",
        "--out",
        tmp_path / "first",
        *sets,
        "--set",
        "training.learning_rate=1e-2",
    )
    base = f"{tmp_path / 'first'}@2"
    settings = [f"model.path={base}", "explore.iterations=1", "algorithm={type: diffusion_dpo, beta: 200.0}"]
    more = [part for setting in settings for part in ("--set", setting)]
    planned = succeed("run", world / "recipe.yaml", "--out", tmp_path / "second", *sets, *more, "--dry-run")
    whole = tmp_path / "first" / "export" / "iteration-2" / "whole"
    assert "nothing was run" in planned.out and not whole.exists()
    succeed(
        "run", world / "recipe.yaml", "--out", tmp_path / "second", *sets, *more, "--stop-after", "train-1"
    )
    assert (whole / "model_index.json").is_file()
    # The whole model predicts what the base predicts with the iterate's adapters.
    iterate, second = diffexpo.open_run(base).policy(), diffexpo.load_policy(base, device="cpu")
    x, t = torch.randn(1, *iterate.latent_shape), torch.tensor([0.5])
    with torch.no_grad(), iterate.weights.use("current"):
        expected = iterate.predict(x, t, iterate.encode_prompts(["thing 1"]))
    with torch.no_grad(), second.weights.use("base"):
        found = second.predict(x, t, second.encode_prompts(["thing 1"]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), iterate.weights.use("base"):
        assert not torch.allclose(
            found, iterate.predict(x, t, iterate.encode_prompts(["thing 1"])), atol=1e-4
        )
    done = command("run", world / "recipe.yaml", "--set", f"model.path={tmp_path / 'first'}@7", "--dry-run")
    assert done.code == MissingError.exit_code and "has no iterate 7; it has trained 1, 2" in done.message
