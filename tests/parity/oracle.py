"""What the parity tests share: a function beside its re-derivation in NumPy, and how the two are compared.

Values agree to 1e-9 in float64 and to 2e-4 in float32; gradients agree with central differences of the NumPy function to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffexpo.rng import numpy_generator

Array = np.ndarray
Truth = Callable[..., Array]
STEP = 1e-5


@dataclass(frozen=True)
class Case:
    """`ours` on tensors and `truth` on arrays, of the same inputs; `trained` inputs have a gradient.

    `inputs` has a letter for each input; what it stands for is said where the cases are. Where a function holds a part of itself
    fixed (a stopped gradient), `held(*inputs)` is the truth with that part held at these inputs.
    """

    ours: Callable[..., Tensor]
    truth: Truth
    inputs: str
    trained: tuple[int, ...]
    held: Callable[..., Truth] | None = None


def assert_values_agree(case: Case, arrays: Sequence[Array]) -> None:
    """In float64 to 1e-9, in float32 to 2e-4, each in the precision of the inputs."""
    truth = case.truth(*arrays)
    value = case.ours(*map(torch.from_numpy, arrays))
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.detach().numpy(), truth, rtol=1e-9, atol=1e-9)
    single = case.ours(*(torch.from_numpy(array).float() for array in arrays))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.detach().numpy(), truth, rtol=2e-4, atol=2e-4)


def assert_gradients_agree(case: Case, arrays: Sequence[Array], name: str) -> None:
    """The gradient of a randomly weighted sum of the values, and none where none belongs."""
    leaves = [torch.from_numpy(array).requires_grad_() for array in arrays]
    out = case.ours(*leaves)
    assert out.requires_grad == bool(case.trained)
    if not case.trained:
        return
    weight = numpy_generator("weight", name).normal(size=tuple(out.shape))
    (out * torch.from_numpy(weight)).sum().backward()
    truth = case.truth if case.held is None else case.held(*arrays)

    def total(*moved: Array) -> float:
        return float((truth(*moved) * weight).sum())

    for index, leaf in enumerate(leaves):
        if index not in case.trained:
            assert leaf.grad is None, f"a gradient reached input {index}, which is held"
            continue
        slope, wider = (slopes(total, arrays, index, STEP * factor) for factor in (1, 10))
        np.testing.assert_allclose(wider, slope, rtol=1e-4, atol=1e-4, err_msg="an input lies at a kink")
        np.testing.assert_allclose(leaf.grad.numpy().reshape(-1), slope, rtol=1e-6, atol=1e-6)


def assert_half_is_raised(case: Case, arrays: Sequence[Array], half: torch.dtype) -> None:
    """Half precision becomes float32 before any arithmetic."""
    halves = [torch.from_numpy(array).to(half) for array in arrays]
    value, expected = case.ours(*halves), case.ours(*(tensor.float() for tensor in halves))
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def slopes(function: Callable[..., float], arrays: Sequence[Array], index: int, step: float = STEP) -> Array:
    """Central differences of a number-valued function in every element of one input."""
    slope = np.zeros(arrays[index].size)
    for element in range(slope.size):
        ends = []
        for sign in (1, -1):
            moved = [array.copy() for array in arrays]
            moved[index].reshape(-1)[element] += sign * step
            ends.append(function(*moved))
        slope[element] = (ends[0] - ends[1]) / (2 * step)
    return slope


def logsig(z: Array) -> Array:
    """log sigmoid, without overflow."""
    return -np.logaddexp(0, -z)
