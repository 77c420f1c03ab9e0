"""Frozen copies of a network that take less of the device's memory, with the same results bit for bit.

Under autocast the weights of linear and convolution layers are cast to half precision whenever they run. A
copy that only runs there may hold exactly those tensors in half precision: casting them once or each time
rounds alike. All others (normalisation, embeddings, free parameters) stay as they are, because autocast
leaves them alone. And a copy that seldom runs may lie in main memory and be moved in for as long as it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Exact classes: a subclass may read its weights in another way than by the operations that autocast casts
# for.
CAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def cast_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that autocast casts to its own type each time they are used."""
    for module in network.modules():
        if type(module) in CAST_LAYERS:
            yield from module.parameters(recurse=False)


def lower_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold in `dtype` what autocast of that type would cast anyway, in place; the network then runs under
    that autocast only."""
    for parameter in cast_parameters(network):
        parameter.data = parameter.data.to(dtype)


def lowered_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of parameters and buffers after `lower_precision`."""
    lowered = {id(parameter) for parameter in cast_parameters(network)}
    return sum(
        tensor.numel() * (dtype.itemsize if id(tensor) in lowered else tensor.element_size())
        for tensor in tensors_of(network)
    )


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, each once."""
    yield from network.parameters()
    yield from network.buffers()


@contextmanager
def moved_to(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the network's tensors are on the device; afterwards those in main memory are in their
    place again.

    Nothing is copied back, so what is written inside the block is lost. For CUDA they are put into
    page-locked memory, from which copies are faster, the first time.
    """
    kept = [(tensor, _locked(tensor, device)) for tensor in tensors_of(network)]
    try:
        for tensor, values in kept:
            tensor.data = values.to(device, non_blocking=True)
        yield
    finally:
        for tensor, values in kept:
            tensor.data = values


def _locked(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor.data = tensor.data.pin_memory()
    return tensor.data
