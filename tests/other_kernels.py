"""A pytest plugin that stands in for the matrix kernels of a processor that is not at hand.

    OMP_NUM_THREADS=1 python -m pytest -q -p tests.other_kernels tests/identities tests/unit

Processors differ in the order of a product's sums and in fused multiply-adds. Under this plugin every element of
a matrix product, convolution or attention is off by up to two units in its last place, by a pattern that depends
on its place in the result. The same product gives the same bits, as on any machine; a product of other rows, or
of the same rows in another batch, does not. A test that fails here bounds less than arithmetic allows for, or
takes for equal what only this machine's kernels make equal. Commands in processes of their own run without it.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


def disturb(value: object) -> None:
    """Multiply a result's elements by 1 - 2 eps to 1 + 2 eps, in place."""
    is_plain = type(value) is torch.Tensor and value.device.type == "cpu"
    if not is_plain or value.dtype not in (torch.float32, torch.float64):
        return
    units = torch.arange(value.numel()).mul_(2654435761).remainder_(5).sub_(2).reshape(value.shape)
    value.mul_(1 + torch.finfo(value.dtype).eps * units.to(value.dtype))


class OtherKernels(TorchDispatchMode):
    """Disturbs what every product returns."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            for value in result if isinstance(result, tuple) else (result,):
                disturb(value)
        return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    with OtherKernels():
        return (yield)
