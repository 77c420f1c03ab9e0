"""Micro-batch size changes speed and memory, not results beyond rounding (with zero-mean residual).

AdamW divides by the root of the second moment, so where a parameter's gradient is rounding itself, its sign and with it a whole
step of that parameter belongs to the split. What must hold: all such steps together are nothing beside the movement.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.invariants.conftest import diffexpo, run_arguments
from tests.world import base_weights, distance


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_do_not_change_the_result(world, truth, tmp_path, micro):
    run_dir = tmp_path / "run"
    changed = ("--set", f"training.micro_batch_size={micro}")
    diffexpo(*run_arguments(world, run_dir), *changed, "--stop-after", "train-1")
    one = load_file(truth / "checkpoints" / "weights-0001.safetensors")
    two = load_file(run_dir / "checkpoints" / "weights-0001.safetensors")
    difference = np.concatenate([(one[name] - two[name]).ravel() for name in one]).astype(np.float64)
    assert distance(one, two, base_weights(world / "model")) < 1e-3
    # Weights of up to 1 are rounded by 6e-8 a step.
    assert np.median(np.abs(difference)) < 1e-6
    spread = difference.std() / np.sqrt(difference.size)
    assert abs(difference.mean()) < 5 * spread + 1e-12
