"""Faults of the kind that only an accelerator shows, put back one at a time: each of them ends a run there, and none does on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.data import latents
from diffexpo.diffusion.sampling import NoiseSource
from diffexpo.online import units
from diffexpo.policies import toy
from diffexpo.rewards import images, python_file
from diffexpo.training import engine
from diffexpo.types import Conditioning
from tests.device import pretend
from tests.invariants.every_method import run

Patch = Callable[[pytest.MonkeyPatch, torch.device | str], None]


def latents_go_to_numpy(patch: pytest.MonkeyPatch, device: torch.device | str) -> None:
    """What `sample` returns is handed to the store as it is."""
    patch.setattr(units, "host_array", np.asarray)


def batches_stay_where_they_are(patch: pytest.MonkeyPatch, device: torch.device | str) -> None:
    patch.setattr(engine, "move_batch", lambda batch, device: batch)


def noise_is_drawn_where_it_is_used(patch: pytest.MonkeyPatch, device: torch.device | str) -> None:
    """By the keyed generators, which are the CPU's."""

    def draw(self: NoiseSource) -> Tensor:
        return torch.stack(
            [torch.randn(self.shape, generator=each, device=device) for each in self.generators]
        )

    patch.setattr(NoiseSource, "draw", draw)


def texts_are_left_behind(patch: pytest.MonkeyPatch, device: torch.device | str) -> None:
    """Embeddings are kept in main memory, and go to the network from there."""

    def predict(self: toy.ToyPolicy, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning.tensors["text"]
        return self.weights.network(x_t.to(self.device), t.to(self.device, x_t.dtype), text.to(x_t.dtype))

    patch.setattr(toy.ToyPolicy, "predict", predict)


def images_are_scored_where_they_are(patch: pytest.MonkeyPatch, device: torch.device | str) -> None:
    """A person's function gets a tensor that NumPy does not take."""

    def score(self: python_file.PythonFileReward, shown: Tensor, prompts: list[str]) -> Tensor:
        return torch.from_numpy(np.stack([image.numpy().mean() for image in images.quantise(shown)]))

    patch.setattr(python_file.PythonFileReward, "score", score)


FAULTS: tuple[Patch, ...] = (
    latents_go_to_numpy,
    batches_stay_where_they_are,
    noise_is_drawn_where_it_is_used,
    texts_are_left_behind,
    images_are_scored_where_they_are,
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_a_fault_that_the_cpu_hides_ends_the_run(
    fault: Patch, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch, "cpu")
    run("expo", tmp_path / "cpu")
    monkeypatch.undo()
    fault(monkeypatch, device)
    with pytest.raises((RuntimeError, TypeError), match="device type|same device"):
        run("expo", tmp_path / "device", device=device)


def test_a_number_read_in_every_micro_batch_is_counted(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What costs a GPU its queue although it gives the right result."""
    name = "training/engine.py _take_step"

    def waits_of(folder: Path) -> int:
        with pretend.counted_waits() as waits:
            run("sft", folder, device=device)
        return sum(count for wait, count in waits.items() if name in wait.callers)

    usual, losses = waits_of(tmp_path / "usual"), engine.Engine._losses

    def reading(self: engine.Engine, *arguments: object) -> object:
        for output in losses(self, *arguments):
            assert float(output.loss.detach()) == float(output.loss.detach())
            yield output

    monkeypatch.setattr(engine.Engine, "_losses", reading)
    assert waits_of(tmp_path / "reading") == 3 * usual
    assert latents.host_array is units.host_array
