"""From Python: the same weights as the command, own functions and lists, what a run gives back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import diffexpo
from diffexpo.errors import ConfigError, MissingError
from tests.commands import diffexpo as command
from tests.world import weights

SMALL = {"explore.iterations": 2, "training.steps": 2, "evaluation": {"kl_prompts": 0, "bootstrap": 20}}
SETS = ["explore.iterations=2", "training.steps=2", "evaluation.kl_prompts=0", "evaluation.bootstrap=20"]


@pytest.fixture(scope="module")
def ran(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[diffexpo.Run, list[tuple]]:
    """A run from Python, and what its callbacks were told."""
    told: list[tuple] = []
    run = diffexpo.run(
        world / "recipe.yaml",
        settings=SMALL,
        seed=3,
        out=tmp_path_factory.mktemp("python") / "run",
        quiet=True,
        on_stage=lambda number, total, name: told.append(("stage", number, total, name)),
        on_step=lambda iteration, step, metrics: told.append(
            ("step", iteration, step, metrics["train/loss"])
        ),
        on_images=lambda version, images, prompts: told.append(
            ("images", version, images.dtype, len(prompts))
        ),
    )
    return run, told


def test_a_call_trains_the_very_weights_of_the_command(world: Path, ran, tmp_path: Path) -> None:
    sets = [part for setting in [*SETS, "seed=3"] for part in ("--set", setting)]
    command("run", world / "recipe.yaml", "--out", tmp_path / "run", *sets)
    assert len(weights(tmp_path / "run")) == 2
    assert weights(tmp_path / "run") == weights(ran[0].folder)


FIVE_LINES = """\
import diffexpo
small = {"explore.iterations": 2, "training.steps": 2, "evaluation": {"kl_prompts": 0, "bootstrap": 20}}
run = diffexpo.run(RECIPE, settings=small, seed=3, name="five")
print(run.win_rate)
run.export()
"""


def test_five_lines_train_the_very_weights_of_the_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(FIVE_LINES.splitlines()) == 5
    names: dict[str, object] = {"RECIPE": world / "recipe.yaml"}
    exec(FIVE_LINES, names)  # noqa: S102 (as a person would type it)
    sets = [part for setting in [*SETS, "seed=3"] for part in ("--set", setting)]
    command("run", world / "recipe.yaml", "--out", tmp_path / "typed", *sets)
    assert len(weights(tmp_path / "typed")) == 2
    assert weights(tmp_path / "runs" / "five") == weights(tmp_path / "typed")


def test_callbacks_are_told_stages_steps_and_images_in_order(ran) -> None:
    run, told = ran
    stages = [line for line in told if line[0] == "stage"]
    names = ["evaluate base", "train 1", "evaluate 1", "collect 1", "pair 1", "train 2", "evaluate 2"]
    assert [line[3] for line in stages] == names
    assert [line[1:3] for line in stages] == [(number, 7) for number in range(1, 8)]
    steps = [line[1:] for line in told if line[0] == "step"]
    assert [step[:2] for step in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [step[2] for step in steps] == run.metrics("train")["train/loss"].to_pylist()
    images = [line[1:] for line in told if line[0] == "images"]
    assert images == [(name, np.dtype("uint8"), 3) for name in ("base", "iteration-1", "iteration-2")]


def test_a_run_gives_back_what_it_holds(ran) -> None:
    run, _ = ran
    assert run.state == "finished" and run.report.name == "report.html"
    assert run.win_rate is not None and run.win_rate.num_prompts == 3
    assert run.config.seed == 3
    assert {"online", "offline"} == set(run.pairs()["source"].to_pylist())
    assert run.pairs(1).num_rows + run.pairs(0).num_rows == run.pairs().num_rows
    assert run.samples(1).num_rows == 4 * 2 * 2
    assert [text for text, _ in run.images("base")] == [text for text, _ in run.images()]
    assert (run.folder / "summary.json").is_file()
    assert "stage 7 of 7: evaluate 2" in (run.folder / "log.txt").read_text()  # though nothing was printed


def test_an_iterate_is_exported_opened_and_started_from(world: Path, ran, tmp_path: Path) -> None:
    run, _ = ran
    first = run.iterate(1)
    assert str(first) == f"{run.folder}@1" and diffexpo.open_run(str(first)).iteration == 1
    files = first.export()
    assert files[0] == run.folder / "export" / "iteration-1"
    assert "iteration-1" in (files[0] / "README.md").read_text()
    current = first.policy().weights.fingerprint("current")
    assert current != run.policy().weights.fingerprint("current")
    with pytest.raises(MissingError, match="no iterate 9; it has trained 1, 2"):
        run.iterate(9)
    started = diffexpo.run(
        world / "recipe.yaml",
        settings={**SMALL, "tuning.start": str(first)},
        out=tmp_path / "started",
        stop_after="train-1",
        quiet=True,
    )
    assert started.state == "stopped"
    start = (started.folder / "checkpoints" / "weights-0000.safetensors").read_bytes()
    assert start == (run.folder / "checkpoints" / "weights-0001.safetensors").read_bytes()
    # It goes on by name, and a finished one is left as it is.
    done = diffexpo.run(resume=started.folder, quiet=True)
    assert done.state == "finished" and diffexpo.run(resume=done.folder).folder == done.folder


def green(images, prompts):
    return images[:, 1].mean(dim=(1, 2))


def test_functions_and_lists_stand_for_rewards_and_prompts(world: Path, tmp_path: Path) -> None:
    run = diffexpo.run(
        world / "recipe.yaml",
        settings={**SMALL, "rewards": [green], "prompts": ["thing 1", {"prompt": "thing 2"}]},
        out=tmp_path / "run",
        stop_after="collect-1",
        quiet=True,
    )
    assert run.config.rewards[0].path == f"{Path(__file__).resolve()}:green"
    assert set(run.samples(1)["prompt"].to_pylist()) == {"thing 1", "thing 2"}
    assert Path(run.config.prompts.source).parent == tmp_path / "given"


def test_policies_and_rewards_take_names(world: Path) -> None:
    policy = diffexpo.load_policy(str(world / "model"), device="cpu")
    assert policy.weights.kind == "lora"
    jpeg, own = diffexpo.load_rewards(["jpeg_compressibility", green])
    assert (jpeg.name, own.name) == ("jpeg_compressibility", "green")


def test_wrong_calls_say_what_was_expected(world: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe given"):
        diffexpo.run(seed=1)
    with pytest.raises(ConfigError, match="resume goes on with one run"):
        diffexpo.run(world / "recipe.yaml", resume="x")
    with pytest.raises(ConfigError, match="training.step is not a setting.*training.steps"):
        diffexpo.run(world / "recipe.yaml", training__step=1)
