"""`diffexpo evaluate`: the same bits alone and beside others, in one process or two, killed or not; only what is missing is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffexpo import assembly
from diffexpo.config.schema import LoraConfig, ModelConfig, TuningConfig
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import export_policy
from tests.commands import Done, command, diffexpo, in_two_processes, kill_when
from tests.world import SIGKILL

SUITE = """\
name: tiny
title: three prompts
prompts: {root}/heldout.txt
seed: 7
images_per_prompt: 2
batch_size: 2
sampler: {{name: ddim, steps: 3, guidance: 2.0}}
judges:
  - {{name: redness, type: python, path: "{root}/rewards.py:redness"}}
  - {{name: size, type: jpeg_compressibility}}
"""
ROWS = 6


@pytest.fixture(scope="module")
def suite(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    file.write_text(SUITE.format(root=world))
    return file


def words(suite: Path, out: Path, *models: object) -> list[str]:
    return ["evaluate", *map(str, models), "--suite", str(suite), "--out", str(out), "--device", "cpu"]


@pytest.fixture(scope="module")
def models(world: Path, truth: Path) -> list[str]:
    """The base, the base at another guidance, and a run's result."""
    return [f"base={world}/model", f"strong={world}/model,guidance=4", f"mine={truth}"]


@pytest.fixture(scope="module")
def together(suite: Path, models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("together") / "out"
    diffexpo(*words(suite, out, *models))
    return out


def images(out: Path, name: str) -> list[bytes]:
    return [(out / "models" / name / "images" / f"{row:05d}.png").read_bytes() for row in range(ROWS)]


def scores(out: Path, name: str) -> dict[str, list[float]]:
    """Scores of all batches by the folder of their scorer, which is named by its version."""
    found: dict[str, list[float]] = {}
    for path in sorted((out / "models" / name / "scores").glob("*/0*.json")):
        found.setdefault(path.parent.name, []).extend(json.loads(path.read_text())["scores"])
    return found


def same(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert images(one, name) == images(other, name), name
        assert scores(one, name) == scores(other, name), name
        assert scores(one, name)


def test_models_differ_and_the_page_says_so(together: Path) -> None:
    drawn = {tuple(images(together, name)) for name in ("base", "strong", "mine")}
    assert len(drawn) == 3
    numbers = json.loads((together / "summary.json").read_text())
    assert numbers["against"] == "base"
    assert set(numbers["models"]) == {"base", "strong", "mine"}
    assert numbers["models"]["strong"]["sampler"]["guidance"] == 4.0
    assert numbers["models"]["base"]["cost"]["network_evaluations"] == ROWS * 3 * 2
    found = [value for values in scores(together, "mine").values() for value in values]
    assert len(found) == 2 * ROWS
    page = (together / "report.html").read_text()
    for told in ("mine", "guidance 4", "redness", "Where the judges disagree"):
        assert told in page


def test_a_model_alone_is_the_same_to_the_bit(
    together: Path, suite: Path, models: list[str], tmp_path: Path
) -> None:
    diffexpo(*words(suite, tmp_path / "alone", models[2]))
    same(tmp_path / "alone", together, "mine")


def test_two_processes_draw_and_score_the_same(
    together: Path, suite: Path, models: list[str], tmp_path: Path
) -> None:
    in_two_processes(*words(suite, tmp_path / "two", *models[1:]))
    same(tmp_path / "two", together, "strong", "mine")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["against"] == "strong"


@pytest.mark.parametrize("after", ["models/*/images/*", "models/*/drawn/*", "models/*/scores/*/0*.json"])
def test_killed_anywhere_it_ends_with_the_same_table(
    after: str, together: Path, suite: Path, models: list[str], tmp_path: Path
) -> None:
    out, arguments = tmp_path / "killed", words(suite, tmp_path / "killed", *models)
    for count in (1, 4, 7):
        kill_when(arguments, lambda count=count: len(list(out.glob(after))) >= count, SIGKILL)
    diffexpo(*arguments)
    same(out, together, "base", "strong", "mine")
    assert (out / "table.csv").read_text() == (together / "table.csv").read_text()


def test_the_images_are_those_of_a_runs_own_evaluation(truth: Path, suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    more = ["--set", "images_per_prompt=1", "--set", "batch_size=4"]
    diffexpo(*words(suite, out, f"mine={truth}@3"), *more)
    for row in range(3):
        mine, theirs = (
            np.asarray(Image.open(folder / "images" / f"{row:05d}.png"))
            for folder in (out / "models" / "mine", truth / "eval" / "iteration-3")
        )
        assert (mine == theirs).all()


@pytest.fixture
def copied(together: Path, tmp_path: Path) -> Path:
    """The evaluation in a folder of its own, to be worked on."""
    return Path(shutil.copytree(together, tmp_path / "copied"))


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_one_judge_more_draws_nothing_and_scores_nothing_twice(
    copied: Path, suite: Path, models: list[str]
) -> None:
    before = stamps(copied, "models/*/images/*") | stamps(copied, "models/*/scores/*/0*.json")
    done = diffexpo(*words(suite, copied, *models[:2]), "--judge", "kilobytes=jpeg_incompressibility")
    assert "draw " not in done.out
    after = stamps(copied, "models/*/images/*") | stamps(copied, "models/*/scores/*/0*.json")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3 * 2, "three batches of two models"
    for name in ("base", "strong"):
        values = {key.rpartition("-")[0]: found for key, found in scores(copied, name).items()}
        assert values["kilobytes"] == [-value for value in values["size"]]


def test_another_version_of_a_judge_keeps_the_scores_of_the_first(
    copied: Path, world: Path, suite: Path, models: list[str], tmp_path: Path
) -> None:
    changed = tmp_path / "rewards.py"
    changed.write_text((world / "rewards.py").read_text().replace("images[:, 0]", "2 * images[:, 0]"))
    before = scores(copied, "base")
    judge = f"judges=[{{name: redness, type: python, path: '{changed}:redness'}}]"
    diffexpo(*words(suite, copied, models[0]), "--set", judge)
    after = scores(copied, "base")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


def test_a_damaged_and_a_lost_image_are_drawn_again_to_the_bit(
    copied: Path, together: Path, suite: Path, models: list[str]
) -> None:
    broken = copied / "models" / "base" / "images"
    (broken / "00001.png").write_bytes(b"\x89PNG")
    (broken / "00004.png").unlink()
    untouched = stamps(copied, "models/mine/images/*")
    done = diffexpo(*words(suite, copied, *models))
    assert "base: 2 batches have changed or lost images; they are drawn again" in done.out
    same(copied, together, "base", "strong", "mine")
    assert stamps(copied, "models/mine/images/*") == untouched


def test_a_folder_of_images_is_judged_as_the_model_that_drew_them(
    together: Path, suite: Path, world: Path, tmp_path: Path
) -> None:
    folder, texts = tmp_path / "drawn", (world / "heldout.txt").read_text().splitlines()
    shutil.copytree(together / "models" / "base" / "images", folder)
    listed = json.loads((together / "suite.json").read_text())["drawing"]["the prompts themselves"]
    lines = [{"file_name": f"{row:05d}.png", "prompt": listed[row // 2]["text"]} for row in range(ROWS)]
    extra = [
        {"file_name": "00000.png", "prompt": listed[0]["text"]},
        {"file_name": "00000.png", "prompt": "a stranger"},
    ]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines[:-2], *extra]))
    done = diffexpo(*words(suite, tmp_path / "out", folder))
    assert "1 prompts of the suite have no image there" in done.out
    assert "1 images are beyond the 2 of their prompt" in done.out
    assert "1 prompts there are not of the suite" in done.out
    for key, values in scores(together, "base").items():
        found = scores(tmp_path / "out", "drawn")[key]
        assert found == [*values[:4], None, None]
    assert "2 images have no score of redness and are left out" in done.out
    assert sorted(texts) == sorted(one["text"] for one in listed)


@pytest.fixture(scope="module")
def lora(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny model, as it is exported."""
    settings = TuningConfig(kind="lora", lora=LoraConfig(rank=2))
    path = str(world / "model")
    policy = load_policy(ModelConfig(path=path, device="cpu"), settings, folder_or_id=path, seed=0)
    generator = np.random.default_rng(0)
    state = {
        name: torch.from_numpy(generator.normal(0, 0.3, value.shape).astype(np.float32))
        for name, value in policy.weights.state("current").items()
    }
    policy.weights.load("current", state)
    folder = tmp_path_factory.mktemp("lora")
    export_policy(policy, "current", folder)
    return folder


def test_a_lora_draws_other_images_and_at_scale_0_those_of_its_base(
    together: Path, suite: Path, world: Path, lora: Path, tmp_path: Path
) -> None:
    entries = [f"with={world}/model+{lora}", f"kohya={world}/model+{lora}/kohya_lora.safetensors"]
    diffexpo(*words(suite, tmp_path, *entries, f"without={world}/model+{lora},scale=0"))
    assert images(tmp_path, "without") == images(together, "base")
    assert images(tmp_path, "with") == images(tmp_path, "kohya") != images(together, "base")
    assert not list(tmp_path.glob("models/*/merged.tmp"))


def unfit_lora(lora: Path, folder: Path) -> Path:
    """The LoRA for a model that has more blocks."""
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    file = folder / "unfit.safetensors"
    save_file({name.replace("blocks.0", "blocks.7"): value for name, value in tensors.items()}, file)
    return file


def refused(suite: Path, out: Path, *arguments: object, code: int = 2) -> str:
    done: Done = command(*words(suite, out), *map(str, arguments))
    assert done.code == code, done.out + done.err
    return done.message


def test_a_judge_that_trained_a_model_is_refused_and_can_be_shown(
    suite: Path, world: Path, truth: Path, tmp_path: Path
) -> None:
    judge = f"bright=python:{world}/rewards.py:brightness"
    message = refused(suite, tmp_path / "no", f"mine={truth}", "--judge", judge)
    assert "judge 'bright' (python) trained mine: it is the run's reward 'brightness'" in message
    assert not (tmp_path / "no" / "models").exists(), "nothing was drawn"
    first = f"judges=[{{name: bright, type: python, path: '{world}/rewards.py:brightness'}}]"
    both = [f"base={world}/model", f"mine={truth}", "--set", first, "--show-trained"]
    diffexpo(*words(suite, tmp_path / "shown", *both))
    numbers = json.loads((tmp_path / "shown" / "summary.json").read_text())
    assert numbers["models"]["mine"]["trained_by"] == ["bright"]
    assert numbers["models"]["mine"]["win_rate"] == {"bright": None}
    assert "trained on it" in (tmp_path / "shown" / "report.html").read_text()


def test_offline_dpo_beside_a_run_is_a_model(truth: Path, world: Path, suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "baseline").mkdir(parents=True)
    shutil.copy(truth / "config.yaml", run)
    assert "baseline.offline_dpo=true" in refused(suite, tmp_path / "no", run / "baseline", code=3)
    (run / "baseline" / "checkpoints").mkdir()
    weights = truth / "checkpoints" / "weights-0001.safetensors"
    shutil.copy(weights, run / "baseline" / "checkpoints")
    # It learned from given pairs: no reward of the run trained it.
    judge = ["--judge", f"bright=python:{world}/rewards.py:brightness"]
    diffexpo(*words(suite, tmp_path / "out", f"dpo={run}/baseline"), *judge)
    diffexpo(*words(suite, tmp_path / "first", f"first={truth}@1"))
    assert images(tmp_path / "out", "dpo") == images(tmp_path / "first", "first")
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]["dpo"]
    assert told["what"] == f"offline DPO beside run {run}"


def test_a_plan_says_what_can_be_seen_and_writes_nothing(
    copied: Path, suite: Path, models: list[str], tmp_path: Path
) -> None:
    done = diffexpo(*words(suite, tmp_path / "new", *models), "--plan")
    assert not (tmp_path / "new").exists()
    assert "2 comparisons sharing 5%" in done.out and "measured so far" not in done.out
    before = stamps(copied, "**/*")
    arguments = [
        *words(suite, copied, *models[:2], f"more={models[0].partition('=')[2]}"),
        "--plan",
        "--json",
    ]
    found = json.loads(diffexpo(*arguments).out)
    assert stamps(copied, "**/*") == before
    assert found["to_draw"] == {"base": 0, "strong": 0, "more": ROWS}
    assert [one["model"] for one in found["measured"]] == ["strong"]
    assert found["judge"] == "redness" and found["level"] == 0.025
    assert "images_per_prompt was 2, now 3" in refused(
        suite, copied, models[0], "--plan", "--set", "images_per_prompt=3"
    )


def test_how_varied_images_are_and_how_far_from_real_ones(
    copied: Path, together: Path, suite: Path, models: list[str], tmp_path: Path
) -> None:
    real = Path(shutil.copytree(together / "models" / "strong" / "images", tmp_path / "real"))
    Image.new("RGB", (32, 16)).save(real / "black.png")
    found = json.loads(diffexpo(*words(suite, copied, *models[:2]), "--real", str(real), "--json").out)
    assert found["real"]["models"]["strong"]["frechet"] == pytest.approx(0.0, abs=1e-6)
    assert found["real"]["models"]["base"]["frechet"] > 0.01
    assert (found["real"]["num"], found["real"]["left_out"]) == (ROWS, 1)
    for label in ("base", "strong"):
        [(mean, low, high)] = found["vendi"]["models"][label].values()
        assert 1.0 <= low <= mean <= high <= 2.0
    assert "How varied the images of a prompt are" in (copied / "report.html").read_text()
    with_one = words(suite, tmp_path / "one", models[0])
    only = Path(shutil.copytree(real, tmp_path / "only", ignore=shutil.ignore_patterns("*[1-9].png")))
    done = command(*with_one, "--real", str(only))
    assert done.code != 0 and "expected at least 2 of each" in done.message


def test_bounds_make_an_exit_code(copied: Path, suite: Path, models: list[str]) -> None:
    arguments = words(suite, copied, *models)
    assert command(*arguments, "--fail-below", "win_rate=0.0", "--fail-below", "redness=-1").code == 0
    failed = command(*arguments, "--fail-below", "win_rate=1.1", "--fail-below", "redness=9")
    assert failed.code == 1
    assert failed.err.count("below its bound") == 4
    assert "mine: win_rate is" in failed.err


def test_what_cannot_be_is_said_before_anything_is_drawn(
    suite: Path, world: Path, lora: Path, together: Path, tmp_path: Path
) -> None:
    base = f"base={world}/model"
    assert "no model is called so" in refused(suite, tmp_path / "a", base, "--against", "other")
    assert "there is no 'winrate'" in refused(suite, tmp_path / "a", base, "--fail-below", "winrate=1")
    assert "needs two models" in refused(suite, tmp_path / "a", base, "--fail-below", "win_rate=1")
    assert "holds no image" in refused(suite, tmp_path / "a", base, "--real", tmp_path / "none", code=3)
    other = refused(suite, together, base, "--set", "images_per_prompt=3")
    assert "images_per_prompt was 2, now 3; choose another folder" in other
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(together / "models" / "base" / "images" / "00000.png", bare)
    for unfit, code in ((bare, 3), (f"{world}/model+{unfit_lora(lora, tmp_path)}", 4)):
        told = refused(suite, tmp_path / "a", base, unfit, code=code)
        assert "no prompts for them; expected metadata.jsonl" in told or "does not fit" in told
    taken = refused(suite, together, f"base={world}/model+{lora}")
    assert "holds images of another model" in taken
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").glob("models/*/images/*"))


def test_without_a_suite_a_run_is_evaluated_by_its_own_settings(truth: Path, world: Path) -> None:
    assert "evaluate: every iteration is complete" in diffexpo("evaluate", truth).out
    done = command("evaluate", truth, f"{world}/model")
    assert done.code == 2 and "2 models and no suite: expected --suite NAME" in done.message
    for asked in (("base=scenes:diffusion",), ("runs/x", "--plan")):
        done = command("evaluate", *asked)
        assert done.code == 2 and "1 model and no suite: expected --suite NAME" in done.message


def test_repeated_long_and_unscored_prompts_are_counted(suite: Path, world: Path, tmp_path: Path) -> None:
    prompts, judge = tmp_path / "prompts.txt", tmp_path / "judge.py"
    prompts.write_text("one\none\ntwo\n" + "long " * 90 + "\n")
    judge.write_text(
        "def picky(images, prompts):\n"
        "    if 'two' in prompts:\n        raise ValueError('not this one')\n"
        "    return [1.0] * len(prompts)\n"
    )
    base = [f"base={world}/model", "--prompts", str(prompts), "--judge", f"picky=python:{judge}:picky"]
    done = diffexpo(*words(suite, tmp_path / "out", *base))
    assert "1 repeated prompts are left out" in done.out
    assert "1 of 3 prompts exceed" in done.out
    assert "base: 2 images have no score of picky and are left out" in done.out
    numbers = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert numbers["models"]["base"]["excluded"] == {"picky": 2}
    assert numbers["models"]["base"]["scores"]["picky"][0] == 1.0
    assert "longer than its text encoder reads" in (tmp_path / "out" / "report.html").read_text()


def test_a_missing_judge_is_named_before_anything_is_drawn(suite: Path, world: Path, tmp_path: Path) -> None:
    message = refused(
        suite, tmp_path, f"base={world}/model", "--judge", "hps=hpsv2.1:gone.safetensors", code=3
    )
    assert "no file gone.safetensors" in message and "HPS_v2.1_compressed.pt" in message
    assert not list(tmp_path.glob("models/*/images/*"))


def test_a_paper_table_needs_what_it_is_made_of(together: Path) -> None:
    with pytest.raises(assembly.MissingError, match="nothing is evaluated for it.*--suite hpsv2"):
        assembly.paper_table("expo", [together])
