"""Processes of a run: a thin view on accelerate's state. One process needs no set-up and starts nothing.

What travels between processes is tensors and JSON, never pickle. Tensors travel in torch's collectives, JSON
and waits through the `group`, where nobody runs out of time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import ConfigError
from diffexpo.training.group import Door, Group, open_door

PATIENCE = timedelta(days=2)
"""How long a collective waits for a process that is slow; one that dies ends the others within seconds."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among `size`; `World()` is a single one. All ranks must call every method."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Group | None = None

    def barrier(self) -> None:
        """Wait for all, however long it takes."""
        if self.group is not None:
            self.group.exchange("")

    def all_reduce_sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one message per dtype."""
        if self.group is None:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in same]).to(self.device)
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                raise self.group.explain(error) from error
            for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The concatenation of every process's list of JSON values, in rank order, on all processes.

        Tuples come back as lists and numbers bit for bit; the same holds for a single process.
        """
        text = json.dumps(items)
        texts = [text] if self.group is None else self.group.exchange(text)
        return [item for part in texts for item in parse_json(part)]

    def refuse_difference(self, facts: Mapping[str, object], advice: str) -> None:
        """A ConfigError on all processes that names what is not the same on all of them."""
        parts = self.gather_objects([dict(facts)])
        for name, value in parts[0].items():
            for rank, part in enumerate(parts):
                if part[name] != value:
                    raise ConfigError(
                        f"{name} is {value} in process 0 but {part[name]} in process {rank}; {advice}"
                    )

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
    group = _join(state.process_index, state.num_processes, state.device)
    return World(state.process_index, state.num_processes, state.device, group)


def _join(rank: int, size: int, device: torch.device) -> Group:
    """The group of all processes: the first tells the others where its door is."""
    listener, told = None, torch.zeros(1024, dtype=torch.uint8, device=device)
    if rank == 0:
        door, listener = open_door(os.environ["MASTER_ADDR"])
        text = torch.frombuffer(bytearray(json.dumps(door).encode()), dtype=torch.uint8)
        told[: len(text)] = text.to(device)
    dist.broadcast(told, 0)
    door = Door(*parse_json(told.cpu().numpy().tobytes().rstrip(b"\0")))
    return Group(rank, size, door, listener)


def stop_world(world: World, error: BaseException | None = None) -> None:
    """Leave the processes, together with them, or alone because of an error, of which they are told."""
    if world.group is not None:
        world.group.close(error)
        PartialState().destroy_process_group()
