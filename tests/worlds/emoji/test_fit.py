"""The moving average of weights."""

from __future__ import annotations

import torch

from worlds.emoji.fit import Average


def test_average_swaps_forth_and_back() -> None:
    module = torch.nn.Linear(2, 2)
    average = Average(module, 0.5)
    before = module.weight.detach().clone()
    module.weight.data += 1
    average.update()  # 2/11 of the way stays: min(0.5, 2/11) is kept
    average.swap()
    torch.testing.assert_close(module.weight.detach(), before + (1 - 2 / 11))
    average.swap()
    torch.testing.assert_close(module.weight.detach(), before + 1)
