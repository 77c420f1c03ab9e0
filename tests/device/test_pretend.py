"""The pretended accelerator itself: it refuses what CUDA refuses, allows what CUDA allows, and counts what CUDA waits for."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.device import pretend


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.arange(12.0).reshape(3, 4).to(device)


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda x: x.numpy(),
    "an array": lambda x: np.asarray(x),
    "a stack of arrays": lambda x: np.stack([x, x]),
    "a sum with the CPU's": lambda x: x + torch.ones(3, 4),
    "a sum of the CPU's with it": lambda x: torch.ones(3, 4) + x,
    "the CPU's times a number of it": lambda x: torch.ones(3) * x[0, 1],
    "a product with the CPU's": lambda x: x @ torch.ones(4, 2),
    "a layer of the CPU": lambda x: torch.nn.Linear(4, 2)(x),
    "both in one tensor": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "both in a stack": lambda x: torch.stack([x, torch.ones(3, 4)]),
    "a choice by the CPU's": lambda x: torch.where(torch.ones(3, 4, dtype=torch.bool), x, x),
    "rows by an index of the CPU": lambda x: x.index_select(0, torch.tensor([0])),
    "the CPU's written into": lambda x: torch.add(torch.ones(3, 4), 1.0, out=x),
    "the CPU's generator": lambda x: torch.randn(2, device=x.device, generator=torch.Generator()),
    "noise in place by it": lambda x: x.normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_an_accelerator_refuses(name: str, x: Tensor) -> None:
    with pytest.raises((RuntimeError, TypeError), match="device type|same device"):
        REFUSED[name](x)


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda x: 2 * x + torch.tensor(1.0),
    "indices of the CPU": lambda x: x[torch.tensor([2, 0])],
    "a mask of the CPU": lambda x: x[torch.tensor([True, False, True])],
    "a choice of a number": lambda x: torch.where(x > 3, x, torch.tensor(0.0)),
    "writing a part": lambda x: x.clone().index_put_((torch.tensor([1]),), torch.tensor(7.0)),
    "copies between both": lambda x: x.clone().copy_(x.cpu() + 1),
    "views": lambda x: x.t()[1:].reshape(-1).view(3, 3),
    "another shape in place": lambda x: x.clone().unsqueeze_(0).squeeze_(0).t_(),
    "a resized result": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(*[x.reshape(1, 1, 3, 4)] * 3),
    "a view written to": lambda x: (y := x.clone(), y[1].zero_())[0],
    "pictures whose channels lie innermost": lambda x: torch.nn.functional.group_norm(
        x.reshape(1, 1, 3, 4).expand(1, 2, 3, 4).contiguous(memory_format=torch.channels_last), 2
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_it_does_as_the_cpu_what_an_accelerator_does(name: str, x: Tensor, device: torch.device) -> None:
    usual = x.cpu()
    ours, expected = ALLOWED[name](x), ALLOWED[name](usual)
    assert ours.device == device
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(x.cpu(), usual)


def test_networks_learn_on_it_as_on_the_cpu(device: torch.device) -> None:
    def trained(place: torch.device | str) -> list[Tensor]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.SiLU(), torch.nn.Flatten(),
            torch.nn.Linear(64, 5),
        ).double().to(place)  # fmt: skip
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, eps=1.0, fused=True)
        images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double().to(place)
        for _ in range(3):
            optimizer.zero_grad()
            network(images).square().mean().backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for ours, expected in zip(trained(device), trained("cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_its_random_numbers_are_its_own(device: torch.device) -> None:
    torch.manual_seed(5)
    first, usual = torch.randn(4, device=device), torch.randn(4)
    torch.manual_seed(5)
    torch.randn(7)  # moves the CPU's generator alone
    assert torch.equal(torch.randn(4, device=device).cpu(), first.cpu())
    torch.manual_seed(5)
    torch.randn(9, device=device)
    assert torch.equal(torch.randn(4), usual)


def test_autocast_is_its_own(device: torch.device) -> None:
    one = torch.ones(2, 2, device=device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (one @ one).dtype == torch.float32
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert (one @ one).dtype == torch.bfloat16
        assert (one.bfloat16() @ one.bfloat16()).softmax(dim=0).dtype == torch.float32
        assert (one.double() @ one.double()).dtype == torch.float64


def test_waits_are_counted(x: Tensor) -> None:
    with pretend.counted_waits() as waits:
        (
            x.cpu(),
            x.tolist(),
            float(x[0, 0]),
            bool((x > 0).all()),
            x[x > 3],
            (x > 3).nonzero(),
            torch.equal(x, x),
        )
    assert waits.total() == 8, waits  # a mask says first how many rows there are, then which
    with pretend.counted_waits() as waits:
        x.sum(), x + 1, torch.ones(2).to(x.device), x[torch.tensor([0])], torch.where(x > 3, x, 0.0)
    assert waits.total() == 0


def test_memory_is_given_back(device: torch.device) -> None:
    gc.collect()
    before = len(pretend.memory)
    kept = [torch.zeros(1000, device=device) for _ in range(10)]
    assert len(pretend.memory) == before + len(kept)
    views = [tensor[10:] for tensor in kept]
    del kept
    gc.collect()
    assert len(pretend.memory) == before + len(views)  # a view keeps what it looks at
    del views
    assert len(pretend.memory) == before


def test_it_is_found_where_it_is_present_only(device: torch.device) -> None:
    assert torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == device.type
    pretend.is_present = False
    assert not torch.accelerator.is_available()
