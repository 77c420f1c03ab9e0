"""The ways in, as people type them: each script runs from its first line to its last without an undocumented step."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffexpo
from diffexpo.config import config_to_yaml, load_config
from tests.commands import ROOT, environment, start
from tests.ways.test_pages import SMALL

WAYS = Path(__file__).parent


def type_in(script: Path, folder: Path, **small: str) -> list[str]:
    """Run a shell script in a folder, its `diffexpo` lines as the commands they are, with further variables; returns what each
    printed."""
    told, rest = [], ""
    bash = {
        **environment(),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONWARNINGS": "ignore",
        **small,
    }
    for line in [*script.read_text(encoding="utf-8").splitlines(), "diffexpo --version"]:
        if not line.startswith("diffexpo "):
            rest += line + "\n"
            continue
        subprocess.run(["bash", "-e", "-c", rest], cwd=folder, check=True, env=bash)
        rest = ""
        done = start(*shlex.split(line)[1:], cwd=folder, **small).wait()
        assert done.code == 0, f"{line}\n{done.out}{done.err}"
        told.append(done.out)
    return told


def make_checkout(folder: Path) -> None:
    """What `make run` looks at, installed already: in place of .venv the environment of the tests."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    (folder / ".venv" / ".installed").touch()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.timeout(1800)
def test_the_newcomer(tmp_path: Path) -> None:
    """As typed, smaller by variables of the environment alone."""
    script, readme = WAYS / "newcomer.sh", (ROOT / "README.md").read_text(encoding="utf-8")
    typed = [
        line for line in script.read_text(encoding="utf-8").splitlines() if re.match("make|diffexpo", line)
    ]
    assert len(typed) == 14 and not [line for line in typed if line not in readme]
    make_checkout(tmp_path)
    more = {"BASELINE__OFFLINE_DPO": "false", "BASELINE__CONTENDERS": "[]", "TUNING__START": "null"}
    more |= {"EVALUATION__BASE_GUIDANCES": "[]", "EXPLORE__BATCH_SIZE": "64"}
    told = type_in(script, tmp_path, **{f"DIFFEXPO_{key}": value for key, value in (SMALL | more).items()})
    assert (tmp_path / "runs/scenes_expo/report.html").is_file(), "what `make run` ends with"
    assert "report: runs/scenes_quick/report.html" in told[0] and "report: runs/seed1/report.html" in told[1]
    assert "is complete; nothing to resume" in told[2]
    assert all(re.search(rf"{name} +finished", told[5]) for name in ("scenes_expo", "scenes_quick", "seed1"))
    with Image.open(tmp_path / "runs/seed1/export/cat.png") as image:
        assert image.size == (64, 64)


@pytest.mark.timeout(1200)
def test_the_practitioner(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    shutil.copy(world / "prompts.txt", tmp_path / "prompts.txt")
    shutil.copy(world / "heldout.txt", tmp_path / "unseen.txt")
    (tmp_path / "votes").mkdir()
    generator, lines = np.random.default_rng(0), ["prompt,winner,loser"]
    for number in range(6):
        for side in "wl":
            pixels = generator.integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "votes" / f"{number}{side}.png")
        lines.append(f"thing {number},{number}w.png,{number}l.png")
    (tmp_path / "votes" / "pairs.csv").write_text("\n".join(lines) + "\n")
    told = type_in(WAYS / "practitioner.sh", tmp_path)
    assert "6 pairs of 6 rows" in told[0] and "nothing was run (--dry-run)" in told[2]
    assert "report: runs/mine/report.html" in told[3]
    assert re.search(r"mine +finished", told[4])
    assert (tmp_path / "pairs.parquet").is_file()
    assert (tmp_path / "runs/mine/export/iteration-1/pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "runs/more/checkpoints/weights-0001.safetensors").is_file()
    with Image.open(tmp_path / "thing.png") as image:
        assert image.size == (16, 16)


@pytest.mark.timeout(1200)
def test_the_researcher(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "explore.iterations=2",
        "training.steps=2",
        "evaluation.kl_prompts=0",
        "evaluation.bootstrap=200",
    ]
    config = load_config([world / "recipe.yaml"], small).config
    (tmp_path / "recipe.yaml").write_text(config_to_yaml(config))
    runpy.run_path(str(WAYS / "researcher.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert len(re.findall(r"^(?:hinge|dpo) seed [12]: win rate", told, re.MULTILINE)) == 4
    assert "True python" in told
    states = [diffexpo.open_run(f"runs/{name}-{seed}").state for name in ("hinge", "dpo") for seed in (1, 2)]
    assert states == ["finished"] * 4
