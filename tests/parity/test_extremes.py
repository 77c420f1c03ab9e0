"""Every function of the parity tests far outside the usual range, in float32: finite where numbers are huge, right where tiny.

Huge errors make logits above 1e4, log-probs lie 1e4 apart, ratios reach the clamp of exp; tiny errors are of the order of 1e-8.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest
import torch

from diffexpo import algorithms
from tests.parity import test_numpy, test_numpy_scored, test_numpy_trajectory
from tests.parity.oracle import Array, Case

# What the letters of a file's inputs stand for.
FORWARD = {"x": "latent", "e": "error", "a": "advantage", "t": "share"}
TRAJECTORY = {letter: "log-prob" for letter in "lst"} | {
    "r": "ratio",
    "v": "ratio",
    "m": "latent",
    "a": "advantage",
}
MODULES: dict[ModuleType, dict[str, str]] = {
    test_numpy: FORWARD,
    test_numpy_scored: FORWARD,
    test_numpy_trajectory: TRAJECTORY,
}
CASES: dict[str, tuple[ModuleType, Case]] = {
    name: (module, case) for module in MODULES for name, case in module.CASES.items()
}
HUGE = {"latent": 1e4, "error": 2e4, "log-prob": 1e4, "ratio": 4e8, "advantage": 5.0, "share": 1.0}
SMALL = {"latent": 0.1, "error": 1.0, "log-prob": -1.0, "ratio": 1.0, "advantage": -5.0, "share": 0.0}
# No tensors of numbers go in: their tests are in tests/identities and tests/unit.
OF_NUMBERS = {"mix_grpo_window", "old_policy_decay", "spo_min_margin"}
WITHOUT_FORMULAS = ("diffexpo.algorithms.improvement_dpo", "diffexpo.algorithms.python")


def roles_of(name: str) -> list[str]:
    module, case = CASES[name]
    return [MODULES[module][letter] for letter in case.inputs]


def scenes(name: str) -> dict[str, list[Array]]:
    """Inputs of a case: one of them far above or below all others, all equal and huge, all zero."""
    arrays, roles = CASES[name][0].inputs_of(name), roles_of(name)

    def filled(values: Sequence[float]) -> list[Array]:
        return [np.full_like(array, value) for array, value in zip(arrays, values, strict=True)]

    small = [SMALL[role] for role in roles]
    found = {"all huge": filled([HUGE[role] for role in roles])}
    for place, role in enumerate(roles):
        found[f"input {place} high"] = filled([*small[:place], HUGE[role], *small[place + 1 :]])
        if role in ("log-prob", "latent"):
            found[f"input {place} low"] = filled([*small[:place], -HUGE[role], *small[place + 1 :]])
    found["all zero"] = filled([1e-9 if role == "ratio" else 0.0 for role in roles])
    return found


@pytest.mark.parametrize("name", CASES)
def test_finite_where_numbers_are_huge_or_zero(name: str) -> None:
    case = CASES[name][1]
    for scene, arrays in scenes(name).items():
        leaves = [torch.from_numpy(array).float().requires_grad_() for array in arrays]
        out = case.ours(*leaves)
        assert torch.isfinite(out).all(), scene
        if case.trained:
            out.sum().backward()
        for index in case.trained:
            assert torch.isfinite(leaves[index].grad).all(), f"{scene}: gradient of input {index}"


def test_the_scenes_reach_logits_above_1e4() -> None:
    margin = CASES["pair_margin"][1].ours
    for scene, arrays in scenes("pair_margin").items():
        if scene.startswith("input"):
            assert (margin(*map(torch.from_numpy, arrays)).abs() > 1e4).all(), scene


def tiny(name: str) -> list[Array]:
    """The usual inputs with errors, latents and log-probs of the order of 1e-8."""
    arrays = CASES[name][0].inputs_of(name)
    is_scaled = (role in ("error", "latent", "log-prob") for role in roles_of(name))
    return [array * 1e-7 if scaled else array for array, scaled in zip(arrays, is_scaled, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_float32_keeps_the_digits_of_tiny_errors(name: str) -> None:
    case, arrays = CASES[name][1], tiny(name)
    value = case.ours(*(torch.from_numpy(array).float() for array in arrays))
    # The inputs themselves are rounded by 6e-8, and differences of errors are up to a thousand times smaller.
    np.testing.assert_allclose(value.numpy(), case.truth(*arrays), rtol=2e-4, atol=1e-20)


def test_every_function_of_the_methods_is_derived() -> None:
    public = {
        name
        for name, function in inspect.getmembers(algorithms, inspect.isfunction)
        if function.__module__ not in WITHOUT_FORMULAS
    }
    assert public - OF_NUMBERS == {name.split(" ")[0] for name in CASES} & public
    assert len(CASES) == sum(len(module.CASES) for module in MODULES), "two cases have one name"
