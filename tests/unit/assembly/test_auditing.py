"""Audits of real folders: which models are meant, labelled images, drawing once, and the run's report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffexpo.assembly.auditing import audit, find_models, read_labelled
from diffexpo.config.audit import AuditConfig
from diffexpo.errors import ConfigError, DataError, MissingError
from tests.commands import diffexpo
from tests.tiny import tiny_diffusion

READER = """\
def hat(images, prompts):
    red = (images[:, 0].mean(dim=(1, 2)) > images[:, 2].mean(dim=(1, 2))).tolist()
    return [float(("hat" in text) == is_red) for text, is_red in zip(prompts, red)]


def safe(images, prompts):
    return [0.9] * len(prompts)
"""
PROTOCOL = """\
name: hats
prompts: {root}/prompts.txt
images_per_prompt: 6
sampler: {{name: ddim, steps: 1, guidance: 1.0}}
attributes: {{hat: {{values: {{yes: "a hat", no: "bald"}}}}}}
classifier: {{name: reader, type: python, path: "{root}/reader.py:hat"}}
labelled: {root}/labelled
safety: {{classifiers: [{{name: safe, type: python, path: "{root}/reader.py:safe"}}], neutral: {root}/prompts.txt, num_prompts: 1}}
resamples: 50
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "prompts.txt").write_text("a judge\na cook\n")
    (folder / "reader.py").write_text(READER)
    (folder / "protocol.yaml").write_text(PROTOCOL.format(root=folder))
    tiny_diffusion(folder / "model", levels=1)
    labels = folder / "labelled"
    labels.mkdir()
    lines = []
    for number in range(6):
        value, colour = (("yes", (250, 0, 0)), ("no", (0, 0, 250)))[number % 2]
        Image.fromarray(np.full((20, 20, 3), colour, dtype=np.uint8)).save(labels / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prompt": "a judge", "hat": value}))
    (labels / "labels.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def test_an_audit_by_the_command_and_again_without_drawing(root: Path, tmp_path: Path) -> None:
    # The tiny autoencoder has random weights, so labelled images are left as they are: their size is another one.
    arguments = [
        "audit",
        f"one={root / 'model'}",
        f"two={root / 'model'}",
        "--protocol",
        root / "protocol.yaml",
    ]
    done = diffexpo(*arguments, "--out", tmp_path)
    assert f"audit: {tmp_path / 'audit.html'}" in done.out
    numbers = json.loads((tmp_path / "audit.json").read_text())
    assert numbers["models"] == ["one", "two"] and numbers["images"]["open"] == {"one": 12, "two": 12}
    hat = numbers["attributes"]["hat"]
    assert hat["recall"] == [1.0, 1.0] and hat["labelled"] == 6
    assert (
        hat["models"]["one"]["groups"]["a judge"]["said"] == hat["models"]["two"]["groups"]["a judge"]["said"]
    )
    assert hat["change"][0] == pytest.approx(0.0), "one model, the same noise"
    assert numbers["safety"]["neutral"]["safe"]["one"] == {
        "share": pytest.approx([0, 0, 0.4899], abs=1e-3),
        "unsafe": 0,
        "images": 4,
    }
    again = diffexpo(*arguments, "--out", tmp_path)
    assert "one, open: 12 images are there" in again.err + again.out
    assert json.loads((tmp_path / "audit.json").read_text()) == numbers
    assert json.loads(diffexpo(*arguments, "--out", tmp_path, "--json").out) == numbers


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none/of/these", "neither a run"),
        ("scenes:nothing", "there is no 'scenes:nothing'"),
        ("a/b c=x", "no run"),
    ],
)
def test_models_that_are_not_there(source: str, message: str, root: Path, tmp_path: Path) -> None:
    done = diffexpo(
        "audit", source, "--protocol", root / "protocol.yaml", "--out", tmp_path / "out", check=False
    )
    assert done.code in (2, 3) and "Traceback" not in done.err
    assert not (tmp_path / "out" / "audit.html").exists()
    if "=" not in source:
        assert message in done.message


class Silent:
    def line(self, text: str) -> None: ...


def test_two_models_of_one_name_are_refused(root: Path, tmp_path: Path) -> None:
    both = [str(root / "model"), str(root / "model")]
    with pytest.raises(ConfigError, match="two have one name; give them as NAME=SOURCE"):
        audit(both, str(root / "protocol.yaml"), [], tmp_path, Silent())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected letters, digits"):
        audit([f"../x={root / 'model'}"], str(root / "protocol.yaml"), [], tmp_path, Silent())  # type: ignore[arg-type]


def test_a_base_model_is_drawn_as_its_base(root: Path) -> None:
    (found,) = find_models(f"mine={root / 'model'}")
    assert (found.name, found.version, found.base) == ("mine", "base", str(root / "model"))
    assert find_models("scenes:diffusion")[0].name == "scenes:diffusion"


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ("nonsense\n", DataError, "line 1: expected an object"),
        ('{"prompt": "x"}\n', DataError, 'line 1: expected an object with "image"'),
        ('{"image": "none.png", "prompt": "x"}\n', MissingError, "does not exist"),
        ('{"image": "../reader.py", "prompt": "x"}\n', DataError, "lies outside of the folder"),
        ('{"image": "labels.jsonl", "prompt": "x"}\n', DataError, "is no image that can be read"),
    ],
)
def test_labelled_images_that_cannot_be_read(
    lines: str, error: type[Exception], message: str, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.jsonl").write_text(lines)
    with pytest.raises(error, match=message):
        read_labelled(str(tmp_path), settings(root))


def settings(root: Path) -> AuditConfig:
    from diffexpo.config.audits import read_audit

    return read_audit(str(root / "protocol.yaml"))


def test_labelled_folders(root: Path, tmp_path: Path) -> None:
    found = read_labelled(str(root / "labelled"), settings(root))
    assert found is not None and len(found) == 6 and found[0][1].attributes == {"hat": "yes"}
    assert read_labelled("none", settings(root)) is None
    with pytest.raises(MissingError, match=r"labels\.jsonl does not exist"):
        read_labelled(str(tmp_path), settings(root))
    with pytest.raises(MissingError, match="no labelled images of this name"):
        read_labelled("scenes:train", settings(root))
