"""Processes of a run: a thin view on accelerate's state. One process needs no set-up and starts nothing.

What travels between processes is tensors and JSON, never pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState

from diffexpo.errors import ConfigError

PATIENCE = timedelta(days=2)
"""How long a process waits for the others: one may import a whole data set, or evaluate, while they wait. A
process that dies ends the others all the same, by its closed connection or its launcher."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among `size`; `World()` is a single one. All ranks must call every method."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def all_reduce_sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one message per dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in same]).to(self.device)
            dist.all_reduce(flat)
            for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The concatenation of every process's list of JSON values, in rank order, on all processes.

        Tuples come back as lists and numbers bit for bit; the same holds for a single process.
        """
        text = json.dumps(items)
        if self.size == 1:
            return json.loads(text)
        payload = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(payload)], device=self.device))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(payload)] = payload
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        texts = [part[:length].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]
        return [item for part in texts for item in json.loads(part)]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value on all processes."""
        return self.gather_objects([value] if self.rank == 0 else [])[0]


def start_world(device: str = "auto") -> World:
    """Join the processes that a launcher started, or be the single one, which initialises nothing.

    `device` is `auto`, `cpu`, or a torch device (of a single process). ConfigError if the launcher's
    variables are incomplete, or do not say how many processes run.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    announced = int(text) if text.isdecimal() else 0
    if announced < 1:
        advice = "unset it or start with torchrun"
        raise ConfigError(f"WORLD_SIZE={text!r} is not a number of processes; {advice}")
    if announced == 1:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return World(device=torch.device(found if device == "auto" else device))
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={announced} but {', '.join(missing)} not set: nothing started the other processes; "
            "unset WORLD_SIZE or start with torchrun"
        )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes != announced:
        running = f"{state.num_processes} processes are running"
        raise ConfigError(f"WORLD_SIZE={announced} but {running}; start all with one torchrun command")
    return World(state.process_index, state.num_processes, state.device)


def stop_world(world: World) -> None:
    """Leave the process group (nothing to do for a single process)."""
    if world.size > 1:
        PartialState().destroy_process_group()
