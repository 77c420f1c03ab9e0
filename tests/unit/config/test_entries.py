"""What `diffexpo evaluate` is given: models, LoRA, iterates and folders of images, told apart by what lies there."""

import pytest

from diffexpo.config.entries import Entry, read_entries, read_entry
from diffexpo.errors import ConfigError, MissingError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a run, a model, a LoRA and images."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "runs/mine/config.yaml",
        "base/model_index.json",
        "lora/pytorch_lora_weights.safetensors",
        "drawn/00000.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scenes:diffusion", Entry("diffusion", "model", "scenes:diffusion")),
        ("owner/name", Entry("name", "model", "owner/name")),
        ("base", Entry("base", "model", "base")),
        ("b=scenes:diffusion", Entry("b", "model", "scenes:diffusion")),
        ("base,guidance=2.5", Entry("base g2.5", "model", "base", guidance=2.5)),
        ("b=base,guidance=1", Entry("b", "model", "base", guidance=1.0)),
        ("base+lora", Entry("base+lora", "model", "base", lora="lora")),
        (
            "base+a/b.safetensors,scale=0.5",
            Entry("base+b x0.5", "model", "base", lora="a/b.safetensors", scale=0.5),
        ),
        ("runs/mine", Entry("mine", "run", "runs/mine")),
        ("mine@2", Entry("mine@2", "run", "runs/mine", 2)),
        ("last=runs/mine@3", Entry("last", "run", "runs/mine", 3)),
        ("runs/mine/baseline", Entry("mine/baseline", "baseline", "runs/mine")),
        ("dpo=mine/baseline", Entry("dpo", "baseline", "runs/mine")),
        ("drawn", Entry("drawn", "images", "drawn")),
    ],
)
def test_a_text_is_what_lies_there(text, expected, place):
    assert read_entry(text) == expected


def test_guidance_scales_multiply_what_is_drawn(place):
    entries = read_entries(["base", "fixed=base,guidance=4", "drawn"], [1.0, 7.5])
    assert [(entry.label, entry.guidance) for entry in entries] == [
        ("base g1", 1.0),
        ("base g7.5", 7.5),
        ("fixed", 4.0),
        ("drawn", None),
    ]
    assert [entry.folder for entry in entries] == ["base-g1", "base-g7.5", "fixed", "drawn"]


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["base", "runs/mine", "base"], ConfigError, "2 models are called 'base'.*LABEL=base"),
        (["nowhere"], MissingError, "nowhere does not exist; expected a diffusers folder"),
        (["mine2@1"], MissingError, "no run 'mine2'.*Did you mean mine?"),
        (["runs/mime"], MissingError, r"no run 'runs/mime'\. Did you mean mine?"),
        (["runs/other/baseline"], MissingError, r"no run 'runs/other/baseline'\. Runs in runs/: mine\."),
        (["base,strength=2"], ConfigError, "'strength=2' is no option"),
        (["base,guidance=high"], ConfigError, "'guidance=high' is no option"),
        (["base,scale=2"], ConfigError, "scale multiplies a LoRA"),
        (["lora"], ConfigError, r"holds a LoRA without its base model; expected BASE\+lora"),
        (["drawn,guidance=2"], ConfigError, "drawn already"),
        (["empty"], MissingError, "neither a run"),
    ],
)
def test_what_cannot_be_told_is_named(texts, error, message, place):
    (place / "empty").mkdir()
    with pytest.raises(error, match=message):
        read_entries(texts)
