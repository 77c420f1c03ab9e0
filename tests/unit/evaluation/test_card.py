"""The model card: what the hub reads, what a person reads, and code that works as it stands."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from diffexpo.config import RunConfig
from diffexpo.config.schema import ModelConfig
from diffexpo.evaluation.card import CARD, GRID, Exported, _told, licence_of, write_card
from diffexpo.policies.base import load_policy
from diffexpo.policies.export import call_arguments, export_policy, left_out
from tests.contract.transformer_families import build_pixart
from tests.tiny import tiny_diffusion, tiny_flow
from tests.unit.evaluation.synthetic_run import make_config, make_run

SETTINGS = {"steps": 2, "guidance": 3.0}


def settings(path: str, kind: str, sampler: str) -> RunConfig:
    values = make_config()
    return RunConfig.model_validate(
        {
            "name": "aligned",
            "model": {"path": path},
            "tuning": {"kind": kind, "lora": {"rank": 4}},
            "rewards": [{"name": "pickscore", "type": "pickscore"}],
            "explore": {"sampler": {"name": sampler, **SETTINGS}},
            "evaluation": values["evaluation"]
            | {"sampler": {"name": sampler, **SETTINGS}, "grid_prompts": 3},
        }
    )


def exported_run(root: Path, model: Path, kind: str, sampler: str) -> tuple[Path, RunConfig, object]:
    """A synthetic run whose export holds moved weights of a tiny model, and its card."""
    config = settings(str(model), kind, sampler)
    policy = load_policy(ModelConfig(device="cpu"), config.tuning, folder_or_id=str(model), seed=0)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():
            parameter.add_(0.05)
    run_dir = make_run(root)
    folder = run_dir / "export"
    done = export_policy(policy, "current", folder)
    exported = Exported(
        kind=kind,
        pipeline_class=policy.folder.pipeline_class,
        files=tuple(Path(str(file)).name for file in done["files"]),
        left_out=left_out(policy),
        arguments=call_arguments(policy),
        base=str(model),
    )
    write_card(run_dir, folder, config, exported)
    return folder, config, policy


BUILDERS = {
    "diffusion": (lambda folder: tiny_diffusion(folder), "ddim"),
    "flow": (lambda folder: tiny_flow(folder), "flow_euler"),
    "pixart": (lambda folder: build_pixart(folder, 0), "ddim"),
}


@pytest.mark.parametrize(
    ("name", "kind"), [("diffusion", "lora"), ("diffusion", "full"), ("flow", "lora"), ("pixart", "lora")]
)
def test_the_code_of_the_card_runs_in_plain_diffusers(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, sampler = BUILDERS[name]
    build(tmp_path / "model")
    folder, _, policy = exported_run(tmp_path, tmp_path / "model", kind, sampler)
    code = re.search(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL)
    assert code is not None and "diffexpo" not in code[1].replace(str(tmp_path), "")
    monkeypatch.chdir(folder)
    found: dict[str, object] = {}
    exec(code[1], found)  # noqa: S102 (the card's own lines)
    assert isinstance(found["image"], Image.Image)
    denoiser = vars(found["pipeline"])["unet" if name == "diffusion" else "transformer"]
    loaded = {key.replace(".base_layer", ""): value for key, value in denoiser.state_dict().items()}
    for key, value in policy.weights.state("current").items():
        # The adapter's name differs, its numbers do not.
        own = key if kind == "full" else key.replace(".weight", ".default.weight")
        candidates = [own, own.replace(".default.", ".default_0.")]
        assert torch.equal(next(loaded[each] for each in candidates if each in loaded), value)


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    folder, _, _ = exported_run(tmp_path, tiny_diffusion(tmp_path / "model"), "lora", "ddim")
    _, front, body = (folder / CARD).read_text().split("---\n", 2)
    read = yaml.safe_load(front)
    assert read["library_name"] == "diffusers" and read["pipeline_tag"] == "text-to-image"
    assert {"lora", "text-to-image", "expo"} <= set(read["tags"])
    # A folder is no hub id, and its licence is not known.
    assert "base_model" not in read and "license" not in read and "not known here" in body


@pytest.mark.parametrize(
    ("path", "licence", "name"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m", None),
        ("black-forest-labs/FLUX.1-dev", "other", "flux.1-dev-non-commercial-license"),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0", None),
        ("emoji:diffusion", "apache-2.0", None),
    ],
)
def test_licence_is_that_of_the_base(path: str, licence: str, name: str | None, tmp_path: Path) -> None:
    exported = Exported(
        "lora", "StableDiffusionPipeline", ("pytorch_lora_weights.safetensors",), (), {}, path
    )
    config = settings(path, "lora", "ddim")
    run_dir = make_run(tmp_path)
    folder = run_dir / "export"
    folder.mkdir()
    card = write_card(run_dir, folder, config, exported).read_text()
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert (front["license"], front.get("license_name")) == (licence, name)
    assert (front.get("base_model") == path) is ("/" in path)
    assert licence_of(path) in card


def test_the_card_tells_numbers_with_intervals_and_shows_images_by_rule(tmp_path: Path) -> None:
    folder, _, _ = exported_run(tmp_path, tiny_diffusion(tmp_path / "model"), "full", "ddim")
    card = (folder / CARD).read_text()
    assert re.search(r"\| `judge_heldout`[^|]*\| no \| [\d.]+ \[[\d.]+, [\d.]+\] \| [\d.]+ \[", card)
    assert re.search(r"\| `judge_train`[^|]*\| yes \|", card)
    assert re.search(r"share of wins[^|]*\| no \| 50% \| [\d.]+% \[", card)
    assert "first 3 evaluation prompts" in card and f"]({GRID})" in card
    assert "algorithm.beta" in card and "@" in card.split("```bibtex")[1]
    with Image.open(folder / GRID) as sheet:
        assert sheet.width > 2 * 128


def test_a_run_that_was_not_evaluated_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    for suite in (run_dir / "eval").glob("*/suite.json"):
        suite.unlink()
    folder = run_dir / "export"
    folder.mkdir()
    exported = Exported("full", "StableDiffusionPipeline", ("export",), (), {}, ".")
    card = write_card(run_dir, folder, settings("x/sd15", "full", "ddim"), exported).read_text()
    assert "was not evaluated" in card and not (folder / GRID).exists()


def test_the_card_draws_with_the_evaluated_sampler_and_says_nothing_of_the_machine(tmp_path: Path) -> None:
    folder, config, policy = exported_run(tmp_path, tiny_diffusion(tmp_path / "model"), "lora", "ddim")
    text = (folder / CARD).read_text()
    assert "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)" in text
    assert str(tmp_path) not in text and 'from_pretrained("../../../model"' in text.replace("'", '"')
    tuning = config.tuning.model_copy(update={"start": "/home/somebody/runs/first@2"})
    assert dict(_told(config.model_copy(update={"tuning": tuning})))["tuning.start"] == "first@2"
    # What reads the files is told the run's name, and may read them.
    export_policy(policy, "current", tmp_path / "named", "my run")
    mask = os.umask(0)
    os.umask(mask)
    for file in (tmp_path / "named").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata()["modelspec.title"] == "my run"
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask
