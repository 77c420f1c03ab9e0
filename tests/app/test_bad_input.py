"""Whatever is wrong, the exit code says what kind, the message says which and what to do, and nothing finished is lost."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffexpo.data.store import Store
from diffexpo.training.checkpoint import load_latest
from tests.commands import diffexpo
from tests.world import jpeg, weights

SMALL = ("explore.iterations=2", "training.steps=2", "evaluation.bootstrap=20")
ALONE = ("explore.iterations=1", "algorithm.alpha=0", "training.steps=24", "evaluation.bootstrap=20")

SCORERS = """\
import torch


def constant(images, prompts):
    return [0.5] * len(prompts)


def never(images, prompts):
    return [float("nan")] * len(prompts)


def raises(images, prompts):
    raise ValueError("no such thing as taste")


def sometimes(images, prompts):
    values = images.mean(dim=(1, 2, 3))
    ours = (images * 255).round().sum(dim=(1, 2, 3)).long() % 3 == 0
    return torch.where(ours, torch.nan, values)
"""


def sets(*settings):
    return [part for setting in settings for part in ("--set", setting)]


def arguments(world, run_dir, *settings):
    return ["run", world / "recipe.yaml", "--out", run_dir, *sets(*settings)]


def state(run_dir):
    return json.loads((run_dir / "status.json").read_text())["state"]


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory) -> Path:
    """A folder of broken versions of what the world holds."""
    root = tmp_path_factory.mktemp("bad")
    (root / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (root / "scorers.py").write_text(SCORERS)
    (root / "syntax.py").write_text("def broken(:\n")
    table = pq.read_table(world / "offline.parquet")
    pq.write_table(table.drop_columns(["jpg_1"]), root / "column.parquet")
    whole = (world / "offline.parquet").read_bytes()
    (root / "short.parquet").write_bytes(whole[: len(whole) // 2])
    nothing = [b"not a picture"] * len(table)
    pq.write_table(
        table.set_column(table.column_names.index("jpg_0"), "jpg_0", pa.array(nothing)), root / "none.parquet"
    )
    shutil.copytree(world / "model", root / "model")
    file = next((root / "model" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    shutil.copytree(world / "model", root / "half", ignore=shutil.ignore_patterns("vae"))
    return root


@pytest.mark.parametrize(
    ("setting", "texts"),
    [
        (
            "training.nonsense_xyz=1",
            ["training.nonsense_xyz is not a setting", "--set training.nonsense_xyz=1", "steps"],
        ),
        (
            "training.learning_rat=1e-4",
            ["training.learning_rat is not", "Did you mean training.learning_rate?"],
        ),
        ("trainig.steps=1", ["trainig", "Did you mean training"]),
        ("training.steps=many", ["training.steps = 'many'", "--set training.steps=many", "an integer >= 1"]),
        ("training.steps=true", ["training.steps = true", "an integer >= 1"]),
        ("algorithm.kind=sigmoit", ["algorithm.kind = 'sigmoit'", "Did you mean sigmoid?"]),
        ("algorithm.beta=-1", ["algorithm.beta = -1", "> 0"]),
        ("training.learning_rate=.nan", ["training.learning_rate", "finite"]),
        ("explore.iterations=1", ["algorithm.alpha = 0.1 with explore.iterations = 1", "never acts"]),
        ("seed", ["has no value", "--set group.key=value"]),
        ("rewards.7.weight=1", ["rewards.7", "a list of length 2"]),
    ],
)
def test_settings(command, world, tmp_path, setting, texts):
    done = command(*arguments(world, tmp_path / "run", setting))
    assert done.code == 2
    for text in texts:
        assert text in done.message
    assert not (tmp_path / "run").exists()


def test_recipes(command, tmp_path):
    (tmp_path / "typo.yaml").write_text("training: {step: 3}\n")
    (tmp_path / "broken.yaml").write_text("training: {steps: 3\n")
    (tmp_path / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name, code, texts in (
        ("typo.yaml", 2, ["training.step is not a setting", "typo.yaml", "Did you mean training.steps?"]),
        ("broken.yaml", 2, ["broken.yaml is not valid YAML"]),
        ("twice.yaml", 2, ["'seed' stands twice"]),
        ("list.yaml", 2, ["list.yaml", "expected a YAML mapping"]),
        ("typ.yaml", 3, ["typ.yaml"]),
    ):
        done = command("run", tmp_path / name, "--out", tmp_path / "run")
        assert done.code == code, name
        for text in texts:
            assert text in done.message
    assert not (tmp_path / "run").exists()


def test_the_plain_process_says_the_same(world, tmp_path):
    done = diffexpo(*arguments(world, tmp_path / "run", "training.learning_rat=1"), check=False)
    assert done.code == 2 and done.out == "" and "Did you mean training.learning_rate?" in done.err


FILES = {
    "prompts missing": (
        "prompts.source={world}/prompt.txt",
        3,
        ["prompts.source", "prompt.txt", "Did you mean", "prompts.txt?"],
    ),
    "prompts in latin-1": ("prompts.source={bad}/latin.txt", 4, ["latin.txt, line 1 is not UTF-8", "0xe9"]),
    "prompts unknown kind": ("prompts.source={world}/recipe.yaml", 4, ["recipe.yaml", ".jsonl"]),
    "held-out missing": (
        "evaluation.prompts={world}/helout.txt",
        3,
        ["evaluation.prompts", "helout.txt", "heldout.txt?"],
    ),
    "negatives missing": (
        "explore.negatives.source={world}/negative.txt",
        3,
        ["explore.negatives.source", "negative.txt", "negatives.txt?"],
    ),
    "offline missing": (
        "offline.source={world}/offlin.parquet",
        3,
        ["offline.source", "offlin.parquet does not exist"],
    ),
    "offline truncated": (
        "offline.source={bad}/short.parquet",
        4,
        ["short.parquet is truncated", "get it again"],
    ),
    "offline column": ("offline.source={bad}/column.parquet", 4, ["column 'jpg_1' is missing", "'jpg_0'"]),
    "offline no picture": ("offline.source={bad}/none.parquet", 4, ["no pair to learn from", "not an image"]),
    "model missing": ("model.path={world}/mode", 3, ["model.path", "no such folder"]),
    "model without a part": ("model.path={bad}/half", 3, ["vae", "save_pretrained"]),
    "model truncated": (
        "model.path={bad}/model",
        4,
        ["diffusion_pytorch_model.safetensors", "damaged", "again"],
    ),
    "reward missing": (
        "rewards.0.path={bad}/scorer.py:constant",
        3,
        ["'brightness'", "no file", "scorer.py"],
    ),
    "reward function": ("rewards.0.path={bad}/scorers.py:constan", 3, ["no function 'constan'", "constant"]),
    "reward syntax": ("rewards.0.path={bad}/syntax.py:broken", 4, ["syntax.py", "SyntaxError"]),
    "reward constant": (
        "rewards.0.path={bad}/scorers.py:constant",
        4,
        ["'brightness'", "all 3 images got 0.5", "use another"],
    ),
    "reward NaN": (
        "rewards.0.path={bad}/scorers.py:never",
        4,
        ["'brightness'", "none of 3 images got a finite score"],
    ),
    "reward raises": (
        "rewards.0.path={bad}/scorers.py:raises",
        4,
        ["'brightness'", "ValueError: no such thing as taste", "line 13 of scorers.py", "none of 3 images"],
    ),
    "sampler": ("evaluation.sampler.name=flow_euler", 2, ["flow_euler", "ddpm"]),
}


BEFORE = [
    "prompts missing",
    "prompts in latin-1",
    "prompts unknown kind",
    "held-out missing",
    "negatives missing",
    "offline missing",
    "model missing",
    "model without a part",
    "model truncated",
    "reward missing",
]


@pytest.mark.parametrize("case", FILES)
def test_files_and_scorers(command, world, bad, tmp_path, case):
    setting, code, texts = FILES[case]
    done = command(*arguments(world, tmp_path / "run", *SMALL, setting.format(world=world, bad=bad)))
    assert done.code == code, done.err
    for text in texts:
        assert text in done.message or text in done.out
    if case in BEFORE:  # what can be looked for is looked for before there is a folder
        assert not (tmp_path / "run").exists()
    else:
        assert state(tmp_path / "run") == "failed"
        # What the person saw stands in the log too.
        assert texts[0] in (tmp_path / "run" / "log.txt").read_text()
    planned = command(
        *arguments(world, tmp_path / "run", *SMALL, setting.format(world=world, bad=bad)), "--dry-run"
    )
    assert (planned.code == code) == (case in BEFORE)


def test_a_corrected_file_is_all_it_takes(command, world, bad, tmp_path):
    prompts = tmp_path / "prompts.txt"
    shutil.copy(bad / "latin.txt", prompts)
    run_dir = tmp_path / "run"
    start = (*arguments(world, run_dir, *SMALL, f"prompts.source={prompts}"), "--stop-after", "collect-1")
    assert command(*start).code == 4
    prompts.write_text("# three things\nthing 0\nthing 1\n\nthing 2\n")
    done = command(*start)
    assert done.code == 0 and "2 comment and blank lines skipped, 3 kept" in done.out
    assert state(run_dir) == "stopped"
    assert Store(run_dir / "store").completed() == [("offline", 0), ("collect", 1), ("train", 1)]


def damaged_rows(world: Path, target: Path) -> None:
    """The world's pairs with a text for a picture, a torn picture, a tie, a row without label, and nonsense labels."""
    rows = pq.read_table(world / "offline.parquet").to_pylist()
    whole = jpeg(np.random.default_rng(1), 64)
    rows[0]["jpg_0"] = b"<html>404</html>"
    rows[1]["jpg_1"] = whole[: len(whole) * 9 // 10]
    rows[2]["label_0"] = rows[2]["label_1"] = 0.5
    rows[3]["has_label"] = False
    rows[4]["label_0"] = 7.0
    rows[5]["caption"] = " "
    rows[6]["caption"] = "a caption with more letters than this encoder has room for"
    pq.write_table(pa.Table.from_pylist(rows), target)


def test_bad_rows_are_left_out_and_counted_and_the_run_goes_on(command, world, bad, tmp_path):
    damaged_rows(world, tmp_path / "offline.parquet")
    prompts = (world / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").write_text(
        prompts + "a prompt with more letters than this encoder has room for\n"
    )
    run_dir = tmp_path / "run"
    done = command(
        *arguments(
            world,
            run_dir,
            *SMALL,
            f"offline.source={tmp_path}/offline.parquet",
            f"prompts.source={tmp_path}/prompts.txt",
            f"rewards.0.path={bad}/scorers.py:sometimes",
            "explore.prompts_per_iteration=8",
        )
    )
    assert done.code == 0, done.err
    assert "Traceback" not in done.err and (run_dir / "report.html").is_file()
    said = done.out + done.err
    for text in ("1 of 10 exceed", "1 quarantined (not an image)", "1 quarantined (truncated or damaged)"):
        assert text in said, said
    store = Store(run_dir / "store")
    report = store.manifest("offline", 0)["report"]
    assert (report["read"], report["kept"], report["ties"], report["unlabelled"]) == (12, 5, 1, 1)
    assert report["quarantined"] == {
        "not an image": 1,
        "truncated or damaged": 1,
        "labels are not 1/0, 0/1 or 0.5/0.5": 1,
        "no caption": 1,
        "prompt too long": 1,
    }
    scores = {row.sample_id: row.rewards["brightness"] for row in store.samples(1)}
    failed = sum(not np.isfinite(score) for score in scores.values())
    assert 0 < failed < len(scores) == 32
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    collected = next(line for line in lines if line["phase"] == "collect")
    assert collected["rollout/reward/brightness/failed"] == failed
    assert "'brightness' gave no finite score for" in said
    pairs = store.pairs(1)
    assert pairs
    for pair in pairs:
        assert np.isfinite(scores[pair.winner_id]) and np.isfinite(scores[pair.loser_id])
    assert store.verify() > 0


def test_a_run_without_offline_pairs_explores_with_the_base_first(command, world, tmp_path):
    run_dir = tmp_path / "run"
    done = command(*arguments(world, run_dir, *SMALL, "offline.source=null"))
    assert done.code == 0, done.err
    assert "no offline pairs, so the base model explores" in done.out
    store = Store(run_dir / "store")
    assert {pair.source for pair in store.pairs()} == {"online"}
    assert len({row.weights for row in store.samples(1)}) == 1
    first, second = weights(run_dir).values()
    assert first != second and (run_dir / "report.html").is_file()


def test_a_folder_in_use_is_refused_and_left_alone(command, world, tmp_path):
    run_dir = tmp_path / "run"
    done = command(*arguments(world, run_dir, *SMALL), "--stop-after", "train-1")
    assert done.code == 0, done.err
    before = weights(run_dir), state(run_dir), (run_dir / "metrics.jsonl").read_bytes()
    with open(run_dir / "run.lock", "r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for call in (["run", "--resume", run_dir], ["collect", run_dir], arguments(world, run_dir, *SMALL)):
            done = command(*call)
            assert done.code == 4
            assert "is in use by" in done.message and "choose another folder" in done.message
    assert (weights(run_dir), state(run_dir), (run_dir / "metrics.jsonl").read_bytes()) == before


@pytest.fixture(scope="module")
def undisturbed(command, world, tmp_path_factory) -> dict[str, str]:
    """Weights of the run that the full disk interrupts, without that."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = command(*arguments(world, run_dir, *ALONE), "--stop-after", "train-1")
    assert done.code == 0, done.err
    return weights(run_dir)


def test_a_full_disk_keeps_the_last_checkpoint_and_a_damaged_one_is_passed_over(
    command, world, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints" / "iteration-0001"
    done = command(*arguments(world, run_dir, *ALONE), limit=200_000, arm=f"{folder}/checkpoint-000002")
    assert done.code == 4, done.err
    assert (
        "cannot write checkpoint" in done.message
        and "free space" in done.message
        and "--resume" in done.message
    )
    assert state(run_dir) == "failed"
    assert not list(folder.glob(".unfinished*"))
    kept = load_latest(folder, warn=pytest.fail)
    assert kept is not None and kept.state["step"] % 2 == 0 and len(list(folder.iterdir())) == 2

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    newest = copy / "checkpoints" / "iteration-0001" / kept.path.name / "current.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)

    done = command("run", "--resume", run_dir)
    assert done.code == 0, done.err
    done = command("run", "--resume", copy, "--stop-after", "train-1")
    assert done.code == 0, done.err
    said = done.out + done.err
    assert kept.path.name in said and "current.safetensors" in said and "falling back" in said
    assert weights(run_dir) == weights(copy) == undisturbed


def test_a_disk_full_to_the_last_byte_is_still_a_message(command, world, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    done = command(
        *arguments(world, run_dir, *ALONE), limit=6000, arm=f"{run_dir}/store/manifests/offline-0000.json"
    )
    assert done.code == 4, done.err
    assert "free space" in done.message
    done = command("run", "--resume", run_dir, "--stop-after", "train-1")
    assert done.code == 0, done.err
    assert weights(run_dir) == undisturbed


def test_damaged_weights_of_an_iterate_are_refused_until_restored(command, world, tmp_path):
    run_dir = tmp_path / "run"
    done = command(*arguments(world, run_dir, *SMALL), "--stop-after", "train-1")
    assert done.code == 0, done.err
    file = run_dir / "checkpoints" / "weights-0001.safetensors"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for data, text in (
        (flipped, "is damaged (its checksum does not match)"),
        (whole[:-100], "cannot be read"),
        (None, "is missing"),
    ):
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        done = command("run", "--resume", run_dir)
        assert done.code == 4
        assert str(file) in done.message and text in done.message and "restore it" in done.message
    file.write_bytes(whole)
    assert command("run", "--resume", run_dir, "--stop-after", "collect-1").code == 0
    assert weights(run_dir)[file.name]


def test_a_start_that_failed_before_anything_was_made_gives_its_folder_to_the_next(
    command, world, bad, tmp_path
):
    run_dir = tmp_path / "run"
    broken = arguments(world, run_dir, *SMALL, f"rewards.0.path={bad}/scorers.py:constan")
    assert command(*broken).code == 3 and state(run_dir) == "failed"
    whole = (*arguments(world, run_dir, *SMALL, "seed=5"), "--stop-after", "train-1")
    assert command(*whole).code == 0
    assert "seed: 5" in (run_dir / "config.yaml").read_text()
    # Now something is made, and another seed is told by name.
    done = command(*arguments(world, run_dir, *SMALL, "seed=6"))
    assert (
        done.code == 2
        and "(seed 5, now 6)" in done.message
        and "seed: 5" in (run_dir / "config.yaml").read_text()
    )


def test_a_plan_names_a_stage_a_rank_and_a_start_that_cannot_be(command, world, tmp_path):
    plan = (*arguments(world, tmp_path / "run", *SMALL), "--dry-run")
    assert "time" in command(*plan).out
    assert command(*plan, "--stop-after", "train-9").code == 2
    lora = ("--set", "tuning={kind: lora, lora: {rank: 4096}}")
    done = command(*plan, *lora)
    assert done.code == 2 and "no adapted layer has a rank above" in done.message
    done = command(*plan, "--set", f"tuning.start={tmp_path}/nowhere@2")
    assert done.code == 3 and "RUN@2" in done.message
    assert not (tmp_path / "run").exists()
