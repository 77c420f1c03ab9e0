"""`diffexpo verify` names every kind of damage of a finished run, and says how it is made good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffexpo.assembly import inputs
from diffexpo.assembly.soundness import restore_settings, verify_run
from diffexpo.config import read_resolved
from diffexpo.errors import ResumeError
from tests.commands import diffexpo
from tests.faults.points import Bench


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "learning_rate" not in line))


KINDS = {
    "inputs.json": (flip, cut),
    "config.yaml": (drop_line, cut, Path.unlink),
    "store/manifests/collect-0001.json": (flip, cut),
    "store/samples-*": (flip, cut, Path.unlink),
    "store/latents-*": (flip, cut, Path.unlink),
    "store/pairs-*": (flip, cut, Path.unlink),
    "checkpoints/weights-0002.safetensors": (flip, cut, Path.unlink),
    "eval/base/suite.json": (flip, cut, Path.unlink),
    "eval/pairs/pairs.json": (flip, cut, Path.unlink),
    "eval/pairs/*.png": (flip, Path.unlink),
    "eval/grid.png": (flip, Path.unlink),
    "eval/base/images/00001.png": (flip, cut, Path.unlink),
    "metrics.jsonl": (lambda path: path.write_text("{" + path.read_text()), flip, cut, Path.unlink),
    "status.json": (cut,),
    "summary.json": (flip, Path.unlink),
    "report.html": (flip, Path.unlink),
    "export/unet/diffusion_pytorch_model.safetensors": (flip, cut, Path.unlink),
    "export/model_index.json": (flip, Path.unlink),
}


@pytest.fixture(scope="module")
def copies(bench: Bench) -> Callable[[], Path]:
    def copy() -> Path:
        target = bench.folder / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(bench.folder / "whole", target)
        return target

    return copy


def test_a_sound_run_is_called_sound(bench: Bench) -> None:
    found = verify_run(bench.folder / "whole")
    assert {finding.state for finding in found} == {"ok"}
    for part in (
        "inputs are what",
        "complete stages",
        "iterates",
        "eval/base",
        "metrics.jsonl",
        "report",
        "export",
    ):
        assert any(part in finding.what for finding in found), part


def test_each_damage_is_named_with_what_to_do(copies: Callable[[], Path]) -> None:
    for pattern, damages in KINDS.items():
        for damage in damages:
            run_dir = copies()
            file = next(run_dir.glob(pattern))
            damage(file)
            failed = [finding.what for finding in verify_run(run_dir) if finding.state == "fail"]
            assert failed, f"{pattern}, {damage}: nothing is said"
            told = "\n".join(failed)
            name = file.parent.name if file.name == "suite.json" else file.name
            assert ("training.learning_rate" if damage is drop_line else name) in told, f"{pattern}: {told}"
            ways = ("resume", "restore", "export", "report", "delete", "accept")
            assert any(way in told for way in ways), told


def test_another_code_is_no_damage_of_a_finished_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "code_fingerprint", lambda: "another")
    found = verify_run(bench.folder / "whole")
    assert [finding.what for finding in found if finding.state == "fail"] == []
    (told,) = [finding.what for finding in found if finding.state == "note"]
    assert "the code of diffexpo" in told and "now 0.1.0 (another)" in told


def test_the_command_says_so_with_its_exit_code(copies: Callable[[], Path]) -> None:
    run_dir = copies()
    assert "ok " in diffexpo("verify", run_dir).out
    drop_line(run_dir / "config.yaml")
    done = diffexpo("verify", run_dir, "--json", check=False)
    assert done.code == 4
    assert any("training.learning_rate" in finding["what"] for finding in json.loads(done.out))
    done = diffexpo("verify", run_dir, "--restore-settings")
    assert "wrote" in done.out


def test_settings_are_restored_to_the_letter(copies: Callable[[], Path]) -> None:
    run_dir = copies()
    path = run_dir / "config.yaml"
    before, text = read_resolved(path).config, path.read_text()
    path.write_text("")
    restore_settings(run_dir)
    assert read_resolved(path).config == before and path.read_text() == text
    (run_dir / "inputs.json").unlink()
    with pytest.raises(ResumeError, match="has no record of its settings"):
        restore_settings(run_dir)


def test_a_finished_run_without_its_report_is_completed(copies: Callable[[], Path]) -> None:
    run_dir = copies()
    (run_dir / "report.html").unlink()
    shutil.rmtree(run_dir / "export")
    diffexpo("run", "--resume", run_dir)
    assert (run_dir / "report.html").is_file() and (run_dir / "export" / "SHA256SUMS").is_file()
