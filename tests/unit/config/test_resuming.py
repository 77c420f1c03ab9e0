"""Merged adapters and smaller copies are refused where they would be wrong or do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffexpo.config import RunConfig, config_to_yaml, load_config
from diffexpo.config.load import leaves
from diffexpo.config.resuming import CHANGEABLE, differences, resumed_config
from diffexpo.errors import ConfigError

LORA, MERGED = "tuning.kind=lora", "explore.merge_lora=true"
TRAJECTORIES = {
    "ddpo": ["explore.sampler={name: ddim, eta: 1.0}"],
    "dpok": ["explore.sampler={name: ddim, eta: 1.0}"],
    "d3po": ["explore.sampler={name: ddim, eta: 1.0}"],
    "prdp": ["explore.sampler={name: ddim, eta: 1.0}"],
    "spo": ["explore.sampler={name: ddim, eta: 1.0}"],
    "flow_grpo": ["explore.sampler={name: flow_sde}"],
}


def load(*overrides: str) -> RunConfig:
    return load_config([], overrides, {}).config


@pytest.mark.parametrize("method", TRAJECTORIES)
def test_methods_on_trajectories_are_refused_with_the_reason(method: str) -> None:
    settings = [f"algorithm.type={method}", "offline.source=null", LORA, *TRAJECTORIES[method]]
    with pytest.raises(
        ConfigError, match=r"merge_lora = true.*round differently, so the ratio.*not be 1 before the first"
    ):
        load(*settings, MERGED)


def test_methods_on_pairs_and_images_may_merge() -> None:
    for method in ("expo", "diffusion_dpo", "diffusion_kto", "mapo"):
        assert load(f"algorithm.type={method}", LORA, MERGED).explore.merge_lora


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([MERGED], "tuning.kind = full: there are no adapters to merge"),
        (
            ["tuning.reference_dtype=bfloat16"],
            "mixed_precision = no.*errors would differ.*mixed_precision=bf16",
        ),
        (["tuning.reference_dtype=float16", "training.mixed_precision=bf16"], "mixed_precision=fp16"),
        (
            ["tuning.reference_dtype=bfloat16", "training.mixed_precision=bf16", LORA],
            "model.dtype is its precision",
        ),
        (["tuning.reference_device=cpu", LORA], "no copies of the denoiser"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(*overrides)


def test_half_precision_fits_the_same_autocast_and_main_memory_fits_any() -> None:
    for cast, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        settings = (f"training.mixed_precision={cast}", f"tuning.reference_dtype={dtype}")
        assert load(*settings, "tuning.reference_device=cpu").tuning.reference_dtype == dtype
    assert load("tuning.reference_device=cpu").tuning.reference_device == "cpu"


def test_a_resumed_run_may_change_memory_and_nothing_else(tmp_path: Path) -> None:
    path, before = tmp_path / "config.yaml", load("training.micro_batch_size=8", "seed=3")
    path.write_text(config_to_yaml(before))
    found = resumed_config(path, ["training.micro_batch_size=4", "model.vae_slicing=true"])
    assert differences(before, found.config) == ["model.vae_slicing", "training.micro_batch_size"]
    assert found.sources["training.micro_batch_size"] == "--set training.micro_batch_size=4"
    assert resumed_config(path, ["seed=3"]).config == before
    for override in (
        "seed=4",
        "explore.batch_size=2",
        "training.learning_rate=1",
        "algorithm.beta=1",
        "rewards=[]",
    ):
        with pytest.raises(ConfigError):
            resumed_config(path, ["training.micro_batch_size=4", override])
    with pytest.raises(
        ConfigError, match=r"--set explore.batch_size with --resume: results depend.*micro_batch_size"
    ):
        resumed_config(path, ["explore.batch_size=2"])
    with pytest.raises(ConfigError, match="does not divide training.batch_size"):
        resumed_config(path, ["training.micro_batch_size=7"])
    with pytest.raises(ConfigError, match="is not a setting"):
        resumed_config(path, ["training.micro_batch_siz=4"])


def test_settings_that_may_change_exist() -> None:
    assert set(CHANGEABLE) <= {name for name, _ in leaves(load().model_dump(mode="json"))}
