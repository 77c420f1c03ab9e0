"""Whole runs on pictures of several shapes: from a folder of them to drawn pictures, killed and resumed, looked at and redrawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.commands import diffexpo, kill_when
from tests.contract.unet_families import build_sdxl
from tests.invariants.conftest import SIGKILL, pair_rows, weights

# Tiny models draw 16 x 16; two pixels are a latent. "3:5" at that area is 20 high and 12 wide.
SIZES = {(16, 16), (12, 20), (20, 12)}
PICTURES = [(40, 24), (24, 40), (30, 30), (33, 20), (19, 31)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a pair: winners of five shapes, losers of other shapes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = root / f"pair{number:02d}"
        folder.mkdir()
        (folder / "prompt.txt").write_text(f"thing {number % 9}")
        for role, place in (("winner", number), ("loser", number + 2)):
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize(PICTURES[place % len(PICTURES)])
            picture.save(folder / f"{role}.png")
    return root


def arguments(world: Path, pictures: Path, run_dir: Path, *more: str) -> list[str]:
    settings = (
        f"offline.source={pictures}",
        "model.buckets=[[12, 20], 3:5]",
        "explore.aspect=uniform",
        "explore.iterations=2",
        "explore.prompts_per_iteration=6",
        "training.steps=4",
        "evaluation.kl_prompts=0",
        *more,
    )
    chosen = [word for setting in settings for word in ("--set", setting)]
    return ["run", str(world / "recipe.yaml"), "--out", str(run_dir), *chosen]


@pytest.fixture(scope="module")
def whole(world: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    diffexpo(*arguments(world, pictures, run_dir), "--stop-after", "train-2")
    return run_dir


def sample_rows(run_dir: Path) -> list[dict[str, object]]:
    return [
        row
        for path in sorted(run_dir.glob("store/samples-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def assert_sizes(run_dir: Path) -> None:
    """Several sizes were imported and drawn; those that compete, and those that are paired, share one."""
    rows = {str(row["sample_id"]): row for row in sample_rows(run_dir)}
    sizes = {name: (row["height"], row["width"]) for name, row in rows.items()}
    assert {sizes[name] for name, row in rows.items() if row["source"] == "offline"} == SIZES
    online = [row for row in rows.values() if row["source"] == "online"]
    assert len({(row["height"], row["width"]) for row in online}) > 1
    for kind in ("group", "unit"):
        shared: dict[tuple[object, object], set[tuple[object, object]]] = {}
        for row in online:
            shared.setdefault((row["iteration"], row[kind]), set()).add((row["height"], row["width"]))
        assert all(len(found) == 1 for found in shared.values()), kind
    by_prompt: dict[object, set[tuple[object, object]]] = {}
    for row in online:
        by_prompt.setdefault(row["prompt_id"], set()).add((row["height"], row["width"]))
    assert all(len(found) == 1 for found in by_prompt.values())
    for pair in pair_rows(run_dir):
        assert sizes[str(pair["winner_id"])] == sizes[str(pair["loser_id"])]


def assert_redrawn(run_dir: Path, out: Path) -> None:
    """A drawn picture of each size is what its row says, bit for bit and in its size."""
    one_of_each = {
        (row["height"], row["width"]): row for row in sample_rows(run_dir) if row["source"] == "online"
    }
    assert len(one_of_each) > 1
    for (height, width), row in one_of_each.items():
        done = diffexpo("data", "regenerate", run_dir, str(row["sample_id"]), out / "picture.png")
        assert "identical" in done.out
        with Image.open(out / "picture.png") as picture:
            assert (picture.height, picture.width) == (height, width)


def test_a_run_imports_draws_and_redraws_several_sizes(whole: Path, tmp_path: Path) -> None:
    assert_sizes(whole)
    assert_redrawn(whole, tmp_path)
    # Evaluation draws the first size alone.
    for path in (whole / "eval").glob("*/images/*.png"):
        with Image.open(path) as picture:
            assert picture.size == (16, 16)


def test_counts_are_printed_kept_and_shown(whole: Path) -> None:
    counts = json.loads((whole / "store/manifests/offline-0000.json").read_text())["payload"]["report"][
        "sizes"
    ]
    assert {tuple(map(int, name.split("x"))) for name in counts} == SIZES and sum(counts.values()) == 12
    line = next(line for line in (whole / "log.txt").read_text().splitlines() if "height x width" in line)
    assert all(f"{count} at {size}" in line for size, count in counts.items())
    rows = Counter(f"{row['height']}x{row['width']}" for row in sample_rows(whole))
    for command in ("stats", "inspect"):
        shown = json.loads(diffexpo("data", command, whole, "--json").out)
        assert shown["samples by size"] == dict(rows)


def test_killed_and_stopped_and_resumed_it_ends_with_the_same_bits(
    whole: Path, world: Path, pictures: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    code = kill_when(
        arguments(world, pictures, run_dir), lambda: any(run_dir.glob("store/samples-0001-*")), SIGKILL
    )
    assert code == -9, "the run ended before it could be killed"
    diffexpo("run", "--resume", run_dir, "--stop-after", "collect-1")
    diffexpo("run", "--resume", run_dir)
    assert weights(run_dir) == weights(whole)
    assert pair_rows(run_dir) == pair_rows(whole)


def test_other_sizes_in_the_same_folder_are_refused(whole: Path, world: Path, pictures: Path) -> None:
    done = diffexpo(*arguments(world, pictures, whole, "model.buckets=[[12, 20]]"), check=False)
    assert done.code == 2 and "other settings" in done.message


def test_the_plan_names_the_sizes(world: Path, pictures: Path, tmp_path: Path) -> None:
    done = diffexpo(*arguments(world, pictures, tmp_path / "run"), "--dry-run")
    assert "16x16, 12x20, 20x12" in " ".join(done.out.split())


def test_xl_learns_adapters_from_several_sizes(world: Path, pictures: Path, tmp_path: Path) -> None:
    build_sdxl(tmp_path / "xl", 0)
    run_dir = tmp_path / "run"
    more = (
        f"model.path={tmp_path / 'xl'}",
        "tuning.kind=lora",
        "tuning.lora.rank=4",
        "explore.aspect=offline",
        "training.steps=2",
    )
    diffexpo(*arguments(world, pictures, run_dir, *more), "--stop-after", "train-2")
    assert_sizes(run_dir)
    assert_redrawn(run_dir, tmp_path)
    assert len(set(weights(run_dir).values())) == 2
