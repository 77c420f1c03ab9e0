"""`diffexpo run --processes N`: the same command in N processes of this machine, which share one run.

    threads of each = max(1, cores // N), unless OMP_NUM_THREADS says otherwise

The first process speaks; how it ends is how the command ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from diffexpo.assembly import ConfigError

MOST = 4
"""Processes that `auto` starts on a CPU at most; each holds the model."""
PATIENCE_S = 30.0
"""How long the others may go on after one has failed: they learn of it by themselves, within a step."""


def is_started_by_a_launcher(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several already, or is told so in a way that is refused later."""
    return variables.get("WORLD_SIZE", "1") != "1"


def is_first(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that speaks."""
    return variables.get("RANK", "0") == "0"


def number_of_processes(wanted: str) -> int:
    """`--processes`: a number, or with "auto" one for each GPU, without one as many as cores, at most `MOST`.

    Raises:
        ConfigError: it is neither.
    """
    if wanted == "auto":
        import torch

        accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        return accelerators or min(os.cpu_count() or 1, MOST)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConfigError(f'--processes is {wanted!r}; expected a number from 1 on, or "auto"')
    return int(wanted)


def run_in_processes(arguments: Sequence[str], count: int) -> int:
    """Run `diffexpo ARGUMENTS` in `count` processes; returns the exit code of the first one, or, where that
    one went well or was stopped from here, of the first that failed."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(_free_port())
    command = [sys.executable, "-m", "diffexpo", *arguments]
    children: list[subprocess.Popen[bytes]] = []
    with _handed_on(children):
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env={**shared, **own}))
        return _wait(children)


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


@contextmanager
def _handed_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside the block SIGTERM reaches the processes too. A terminal's Ctrl-C does by itself, so here it ends
    nothing, and is sent on only where it came to this process alone."""

    def tell(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM or not sys.stdin or not sys.stdin.isatty():
            for child in children:
                child.send_signal(number)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, end those that do not end themselves."""
    failed_at: float | None = None
    while None in (codes := [child.poll() for child in children]):
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE_S:
            for child in children:
                child.kill()
        time.sleep(0.05)
    first, *others = (child.returncode for child in children)
    code = first if first > 0 else next((code for code in others if code > 0), first)
    # A process that a signal ended, as a shell tells it.
    return code if code >= 0 else 128 - code
