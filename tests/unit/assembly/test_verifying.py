"""`rewards verify` and `rewards list`: good scorers pass, bad ones fail with the reason, numbers can be compared."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffexpo.assembly.verifying import REFERENCES, require_passed, verify_pictures, verify_rewards
from diffexpo.cli.main import main
from diffexpo.config.rewards import REWARDS
from diffexpo.errors import ConfigError, DataError, MissingError, RewardError
from tests.tiny import tiny_judge

EXAMPLE = Path(__file__).parents[3] / "examples" / "official_scores.py"
KNOWN = {
    ("jpeg_compressibility", None): "jpeg_compressibility.json",
    ("jpeg_incompressibility", None): "jpeg_incompressibility.json",
    ("clip", "emoji:judge_train"): "judge_train.json",
    ("clip", "emoji:judge_heldout"): "judge_heldout.json",
}
SCORER_FILE = """
import torch
def bright(images, prompts):
    return 1 + images.mean(dim=(1, 2, 3))
def constant(images, prompts):
    return [1.0] * len(prompts)
def holes(images, prompts):
    return [float("nan") if "fire" in prompt else float(len(prompt)) for prompt in prompts]
def relative(images, prompts):
    means = images.mean(dim=(1, 2, 3))
    return means / means.sum()
def contrary(images, prompts):
    return [float(-prompt.startswith(("fire", "red", "star"))) + 0.01 * len(prompt) for prompt in prompts]
"""


def verify(what: str, **settings: object) -> list:
    defaults = {"path": None, "base": None, "scale": None, "precision": "float32", "device": "cpu"}
    return verify_rewards(
        what, **{**defaults, "against": None, "tolerance": 1e-3, "pictures": None, **settings}
    )


def states(report: object) -> dict[str, str]:
    """First words of what was checked -> state."""
    return {" ".join(check.what.split()[:3]): check.state for check in report.checks}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["rewards", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture
def scorers(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCORER_FILE)
    return path


@pytest.mark.parametrize(("kind", "path"), KNOWN)
def test_shipped_scorers_have_their_known_scores(kind: str, path: str | None) -> None:
    (report,) = verify(kind, path=path)
    require_passed([report])
    assert sum("against" in check.what for check in report.checks) == 1
    assert {check.state for check in report.checks} <= {"ok", "note"}


def test_every_reference_belongs_to_a_scorer() -> None:
    assert {path.name for path in REFERENCES.iterdir()} == set(KNOWN.values())


def test_pictures_differ_and_are_what_is_written(tmp_path: Path) -> None:
    shown, images = verify_pictures()
    assert len({picture.sha256 for picture in shown}) == len({picture.prompt for picture in shown}) == 16
    verify("jpeg_incompressibility", pictures=tmp_path)
    saved = np.asarray(Image.open(tmp_path / f"{shown[3].name}.png"))
    np.testing.assert_array_equal(saved, (images[3].numpy() * 255).round().transpose(1, 2, 0))
    listed = json.loads((tmp_path / "prompts.json").read_text())
    assert [entry["prompt"] for entry in listed] == [picture.prompt for picture in shown]


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("bright", set()),
        ("constant", {"every picture has"}),
        ("holes", {"2 of 32"}),
        ("relative", {"alone as in"}),
        ("contrary", {"own prompt above"}),
    ],
)
def test_what_is_wrong_with_a_scorer_is_found(scorers: Path, function: str, wrong: set[str]) -> None:
    (report,) = verify("python", path=f"{scorers}:{function}")
    failed = {what for what, state in states(report).items() if state == "fail"}
    assert wrong <= failed and (wrong or not failed)
    if wrong:
        with pytest.raises(RewardError, match="python: a check failed"):
            require_passed([report])


def test_scores_are_written_and_compared(
    scorers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", "python", "--path", f"{scorers}:bright", "--device", "cpu"]
    file = tmp_path / "scores" / "bright.json"
    assert call(capsys, *arguments, "--write", str(file))[0] == 0
    code, out, _ = call(capsys, *arguments, "--against", str(file))
    assert code == 0 and "OK    against bright.json: largest relative difference" in out
    assert "noto-1f525  fire emoji" in out
    content = json.loads(file.read_text())
    content["scorers"][0]["scores"]["noto-1f525"] *= 1.1
    file.write_text(json.dumps(content))
    code, out, err = call(capsys, *arguments, "--against", str(file))
    assert code == 4 and "FAIL  against" in out and "do not train on this reward" in err
    assert call(capsys, *arguments, "--against", str(file), "--tolerance", "0.2")[0] == 0
    reports = json.loads(call(capsys, *arguments, "--json")[1])
    assert len(reports[0]["scores"]) == 16


def official_scores(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    """`python examples/official_scores.py ARGUMENTS`"""
    monkeypatch.setattr(sys, "argv", ["official_scores.py", *map(str, arguments)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_scores_of_the_model_cards_code_are_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, other = str(tiny_judge(tmp_path / "judge")), str(tiny_judge(tmp_path / "other", seed=1))
    verify("pickscore", path=judge, base=judge, pictures=tmp_path / "pictures")
    for weights, expected in ((judge, "ok"), (other, "fail")):
        out = tmp_path / "official.json"
        official_scores(
            monkeypatch, "pickscore", tmp_path / "pictures", out, "--path", weights, "--base", judge
        )
        (report,) = verify("pickscore", path=judge, base=judge, against=out, tolerance=1e-4)
        assert [check.state for check in report.checks if "against" in check.what] == [expected]


def test_packages_are_called_as_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hps_score(file: str, prompt: str, *, hps_version: str) -> list[float]:
        asked.append((Path(file).is_file(), hps_version))
        return [len(prompt) / 100]

    reward = SimpleNamespace(score=lambda prompt, file: -float(len(prompt)))
    monkeypatch.setitem(sys.modules, "hpsv2", SimpleNamespace(score=hps_score))
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda name: reward))
    shown, _ = verify_pictures()
    verify("jpeg_compressibility", pictures=tmp_path)
    for kind, sign in (("hpsv2.1", 1), ("imagereward", -1)):
        official_scores(monkeypatch, kind, tmp_path, tmp_path / "official.json")
        (scorer,) = json.loads((tmp_path / "official.json").read_text())["scorers"]
        assert scorer["type"] == kind
        assert scorer["scores"] == pytest.approx({each.name: sign * len(each.prompt) for each in shown})
    assert asked == [(True, "v2.1")] * len(shown)


def test_what_cannot_be_compared_is_named(scorers: Path, tmp_path: Path) -> None:
    path = f"{scorers}:bright"
    with pytest.raises(MissingError, match="no file"):
        verify("python", path=path, against=tmp_path / "none.json")
    file = tmp_path / "bad.json"
    file.write_text("[]")
    with pytest.raises(DataError, match=r"bad.json: no scores of 'python'"):
        verify("python", path=path, against=file)
    file.write_text(json.dumps({"scorers": [{"scores": {"noto-1f525": 1.0}}]}))
    (report,) = verify("python", path=path, against=file)
    assert "has no score of 15 pictures" in report.checks[-1].what


def test_settings_are_checked_before_anything_is_loaded() -> None:
    for settings, message in (
        ({"what": "clip"}, "path is empty: type clip needs a folder"),
        ({"what": "jpeg_compressibility", "scale": "raw"}, "has its own unit"),
        ({"what": "jpeg_compressibility", "precision": "float16"}, "holds no network"),
        ({"what": "clip", "path": "x", "base": "y"}, "stands on no other model"),
        ({"what": "clip", "path": "x", "scale": "nonsense"}, "scale"),
        ({"what": "emoji/expo", "path": "x"}, "no type of reward"),
        ({"what": "jpeg_compressibility", "device": "nonsense"}, "expected auto, cpu, cuda"),
    ):
        with pytest.raises(ConfigError, match=message):
            verify(**settings)


def test_missing_weights_say_where_they_are_and_how_to_convert_them() -> None:
    for kind, words in (
        ("hpsv2.1", ("path is empty", "HPS_v2.1_compressed")),
        ("imagereward", ("path is empty", "ImageReward")),
        ("aesthetic", ("path is empty", "head")),
    ):
        with pytest.raises(ConfigError) as caught:
            verify(kind)
        assert all(word in str(caught.value) for word in words)
        with pytest.raises(MissingError) as missing:
            verify(kind, path="weights.pt")
        text = str(missing.value)
        assert all(
            word in text for word in ("pickled", "weights_only=True", "licence", REWARDS[kind].licence)
        )


def test_a_recipe_verifies_its_rewards_and_judges(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "verify", "emoji/expo", "--device", "cpu")
    assert code == 0
    assert out.count("own prompt above another picture's") == 2 and out.count("OK    against judge_") == 2


def test_every_type_is_listed_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "list")[1]
    assert all(f"  {name} " in out for name in REWARDS)
    listed = json.loads(call(capsys, "list", "--json")[1])
    assert listed["hpsv2"]["licence"] == "Apache-2.0" and listed["hpsv2"]["scales"][0] == "percent"


def test_a_type_that_is_spelt_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean jpeg_compressibility"):
        verify_rewards(
            "jpeg_compresibility", path=None, base=None, scale=None, precision="float32", device="cpu", against=None,
            tolerance=1e-3, pictures=None,
        )  # fmt: skip


def test_a_scorer_of_scenes_is_not_verified_on_single_emoji() -> None:
    with pytest.raises(ConfigError, match="single emoji; `python -m worlds.scenes quality` measures it"):
        verify_rewards(
            "scene_correct",
            device="cpu",
            against=None,
            tolerance=1e-3,
            pictures=None,
            path="scenes:checker_train",
        )
