"""`explore.keep: best`: validation chooses the result, changes nothing else, and survives being killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffexpo import assembly
from diffexpo.assembly.folders import result_path
from diffexpo.cli.progress import Console
from diffexpo.config import load_config
from diffexpo.data.store import Store
from diffexpo.errors import MissingError
from diffexpo.training.checkpoint import read_tensors
from diffexpo.training.metrics import read_metrics
from tests.invariants.conftest import SIGKILL, diffexpo, kill_when, run_arguments, weights

CONSTANT = "def constant(images, prompts):\n    return [0.5] * len(prompts)\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("validation") / "prompts.txt"
    file.write_text("other 1\nother 2\nother 3\nother 4\nother 5\n")
    return file


def best(prompts: Path, judge: str, **more: object) -> list[str]:
    """Settings of a run that keeps the best iterate under a function of a file."""
    named = {"prompts": str(prompts), "num_prompts": 4, "images_per_prompt": 2}
    named["judges"] = [{"name": "chooses", "type": "python", "path": judge}]
    explore = {"keep": "best", "validation": named} | more
    return [f"explore.{name}={json.dumps(value)}" for name, value in explore.items()]


def run(world: Path, folder: Path, *settings: str) -> Path:
    loaded = load_config([str(world / "recipe.yaml")], settings)
    given = {"sources": loaded.sources, "resume": folder.exists(), "console": Console()}
    assembly.run(loaded.config, folder, **given)
    return folder


@pytest.fixture(scope="module")
def chosen(world: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose validation judge likes red."""
    folder = tmp_path_factory.mktemp("chosen") / "run"
    return run(world, folder, *best(prompts, f"{world}/rewards.py:redness"))


def means(folder: Path) -> dict[int, float]:
    """Mean of the scores in each manifest, by hand."""
    store = Store(folder / "store", create=False)
    numbers = [number for stage, number in store.completed() if stage == "validate"]
    scores = {number: store.manifest("validate", number)["scores"]["chooses"] for number in numbers}
    return {number: sum(values) / len(values) for number, values in scores.items()}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "export" / "unet" / "diffusion_pytorch_model.safetensors")


def is_iterate(tensors: dict[str, torch.Tensor], folder: Path, number: int) -> bool:
    iterate = read_tensors(folder / "checkpoints" / f"weights-{number:04d}.safetensors")
    return all(torch.equal(tensors[name], value) for name, value in iterate.items())


def test_validation_changes_no_iterate_and_the_last_is_what_is_kept_without_it(
    truth: Path, chosen: Path
) -> None:
    assert weights(chosen) == weights(truth) and len(weights(truth)) == 3
    assert is_iterate(exported(truth), truth, 3) and means(truth) == {}
    images = "eval/iteration-2/images/00000.png"
    assert (chosen / images).read_bytes() == (truth / images).read_bytes()


def test_the_iterate_that_scored_best_is_exported_reported_and_started_from(chosen: Path) -> None:
    found = means(chosen)
    number = max(found, key=lambda k: found[k])
    assert sorted(found) == [1, 2, 3] and len(set(found.values())) == 3
    assert [is_iterate(exported(chosen), chosen, k) for k in (1, 2, 3)] == [k == number for k in (1, 2, 3)]
    config = load_config([chosen / "config.yaml"], (), {}).config
    assert is_iterate(read_tensors(result_path(chosen, config, "start")), chosen, number)
    page, card = (chosen / "report.html").read_text(), (chosen / "export" / "README.md").read_text()
    for text in (page, card):
        assert f"Iteration {number} is kept: of 3 iterates chooses scores it best on 4 validation" in text
    assert 'id="fig-validation"' in page and "the one that the validation judge chose" in page
    lines = [line for line in read_metrics(chosen / "metrics.jsonl") if line["phase"] == "validate"]
    assert [line["validation/chooses/mean"] for line in lines] == pytest.approx(list(found.values()))
    # The evaluation's prompts are not among those that chose.
    asked = Store(chosen / "store", create=False).manifest("validate", 1)["prompts"]
    evaluated = json.loads((chosen / "eval" / "base" / "suite.json").read_text())["prompts"]
    assert (
        len(asked) == 8 and len(set(asked)) == 4 and not set(asked) & {prompt["id"] for prompt in evaluated}
    )


# In the order in which a run comes to them: before, within and after validations.
MOMENTS = ("checkpoints/weights-0001.safetensors", "store/manifests/train-0002.json", "eval/iteration-3")


def test_killed_around_validations_and_resumed_it_keeps_the_same(
    world: Path, prompts: Path, chosen: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = [word for one in best(prompts, f"{world}/rewards.py:redness") for word in ("--set", one)]
    arguments = [*run_arguments(world, folder), *settings]
    for moment in MOMENTS:
        reached = lambda moment=moment: (folder / moment).exists()
        assert kill_when(arguments, reached, SIGKILL) == -9, moment
        arguments = ["run", "--resume", str(folder)]
    diffexpo(*arguments)
    assert weights(folder) == weights(chosen) and means(folder) == means(chosen)
    for name in ("validate-0001.json", "validate-0002.json", "validate-0003.json"):
        place = Path("store") / "manifests" / name
        assert (folder / place).read_bytes() == (chosen / place).read_bytes()
    ours, theirs = exported(folder), exported(chosen)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("every", ["true", "false"])
def test_equal_scores_keep_the_first_and_patience_ends_the_run(
    world: Path, prompts: Path, tmp_path: Path, every: str
) -> None:
    (tmp_path / "judge.py").write_text(CONSTANT)
    settings = best(prompts, f"{tmp_path}/judge.py:constant", patience=1)
    quick = ["training.steps=2", "evaluation.kl_prompts=0", f"evaluation.every_iteration={every}"]
    folder = run(world, tmp_path / "run", *settings, *quick)
    assert sorted(weights(folder)) == ["weights-0001.safetensors", "weights-0002.safetensors"]
    assert (
        is_iterate(exported(folder), folder, 1)
        and not (folder / "store/manifests/collect-0002.json").exists()
    )
    page, log = (folder / "report.html").read_text(), (folder / "log.txt").read_text()
    assert "ended after iteration 2 of 3" in page and "<b>Unfinished.</b>" not in page
    assert "kept iteration 1" in log
    evaluated = {path.name for path in (folder / "eval").glob("iteration-*")}
    assert evaluated == ({"iteration-1", "iteration-2"} if every == "true" else {"iteration-1"})
    # Nothing is left to do, and single stages know it.
    assert diffexpo("train", folder).code == 0 and len(weights(folder)) == 2


def test_a_run_that_is_not_validated_to_its_end_has_no_result_yet(
    world: Path, prompts: Path, tmp_path: Path
) -> None:
    settings = best(prompts, f"{world}/rewards.py:redness")
    loaded = load_config([str(world / "recipe.yaml")], [*settings, "training.steps=2"])
    given = {"sources": loaded.sources, "resume": False, "console": Console()}
    folder = tmp_path / "run"
    assembly.run(loaded.config, folder, **given, stop_after="train-3")
    with pytest.raises(MissingError, match="iteration 3 of the run .* is not validated.*--resume"):
        result_path(folder, loaded.config, "start")


@pytest.mark.parametrize(
    ("shared", "key", "reason"),
    [
        ("unseen 2", "evaluation.prompts", "would be chosen by the images"),
        ("thing 3", "prompts.source", "gaining"),
    ],
)
def test_prompts_that_are_evaluated_or_trained_on_are_refused(
    world: Path, tmp_path: Path, shared: str, key: str, reason: str
) -> None:
    (tmp_path / "mixed.txt").write_text(f"other 1\n{shared}\n")
    settings = best(tmp_path / "mixed.txt", f"{world}/rewards.py:redness")
    words = [word for one in settings for word in ("--set", one)]
    done = diffexpo(*run_arguments(world, tmp_path / "run"), *words, check=False)
    assert done.code == 2 and f"1 of its 2 prompts are also in {key}, such as '{shared}'" in done.err
    assert reason in done.err
