"""What a run's method means for its size."""

from __future__ import annotations

import pytest

from diffexpo.config import RunConfig, load_config
from diffexpo.estimate.memory import TrainingShape
from diffexpo.estimate.method import training_shape, versions
from diffexpo.estimate.resources import _moved_in, sizes_of

EIGHT = ["training.batch_size=16", "training.micro_batch_size=8", "algorithm.type=diffusion_dpo"]
HALF = ["training.mixed_precision=bf16", "tuning.reference_dtype=bfloat16"]
HELD = ["algorithm.anchor_weight=0.01", "algorithm.reference=ema"]


def load(*overrides: str) -> RunConfig:
    return load_config([], [*EIGHT, *overrides], {}).config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], TrainingShape(16, 16)),
        (["algorithm.draws=4"], TrainingShape(64, 64)),
        (["algorithm.draws=4", "training.pair_gradient=two_pass"], TrainingShape(32, 0, 64)),
        (["algorithm.type=expo", "algorithm.alpha=0.1", "algorithm.draws=2"], TrainingShape(40, 40)),
        (["algorithm.type=mapo", "algorithm.draws=2"], TrainingShape(32)),
        (["algorithm.kind=simpo"], TrainingShape(16)),
        (["algorithm.kind=simpo", "algorithm.anchor_weight=0.01"], TrainingShape(16, 16)),
    ],
)
def test_rows_of_a_micro_batch(overrides: list[str], expected: TrainingShape) -> None:
    assert training_shape(load(*overrides)) == expected


def test_a_reference_that_follows_is_a_version_of_its_own() -> None:
    for reference in ("previous", "ema"):
        assert versions(load(f"algorithm.reference={reference}")) == ["current", "base", "main", "reference"]
    assert "reference" not in versions(load("algorithm.reference=base"))


def test_the_base_of_an_anchor_is_moved_in_for_its_pass() -> None:
    def moved(*overrides: str) -> tuple[int, int]:
        config = load(*overrides)
        return _moved_in(config, sizes_of(config, None))

    whole = sizes_of(load(), None).denoiser.bytes
    assert moved(*HELD) == (0, 0)
    assert moved(*HALF) == (0, whole)
    assert moved(*HALF, *HELD) == (whole, whole)
    # The reference is the base, and serves as the anchor too.
    assert moved(*HALF, "algorithm.anchor_weight=0.01") == (0, whole)
