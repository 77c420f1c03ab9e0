"""Real `diffexpo` commands in processes of their own (see forkserver.py), for tests that kill, limit and join them."""

from __future__ import annotations

import atexit
import functools
import glob
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Garbage is collected from when everything has been imported.
FORK_SERVER = "import gc, runpy; gc.disable(); runpy.run_module('tests.forkserver', run_name='__main__')"


def environment() -> dict[str, str]:
    """What a command of a test sees: as many threads as the test itself (another number would sum in another
    order), no colours, no network."""
    return os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What the person is told, after checking that it is no traceback."""
        assert "Traceback" not in self.err + self.out, self.err
        assert any(line.startswith("error: ") for line in self.err.splitlines()), self.err
        return self.err


class Server:
    """The process that forks, and a folder for what its children print."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="diffexpo-commands-")
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, request: Mapping[str, object]) -> dict[str, int | None]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server ended"
        return json.loads(answer)

    def start(
        self,
        arguments: list[str],
        extra: Mapping[str, str],
        limit: int | None,
        module: str | None,
        cwd: str | Path | None = None,
    ) -> Command:
        number = next(self._numbers)
        out, err = (Path(self._folder.name) / f"{number}.{kind}" for kind in ("out", "err"))
        for printed in (out, err):  # there to be read before the child opens it
            printed.touch()
        request = {
            "start": arguments,
            "module": module,
            "cwd": str(cwd or self._folder.name),
            "out": str(out),
            "err": str(err),
            "environment": dict(extra),
            "limit": limit,
        }
        pid = self.ask(request)["pid"]
        assert pid is not None
        return Command(self, pid, out, err)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()


@dataclass
class Command:
    """A command that runs."""

    server: Server
    pid: int
    out: Path
    err: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._ask(block=False)

    def wait(self) -> Done:
        """Until it has ended."""
        code = self._ask(block=True)
        assert code is not None
        return Done(code, self.out.read_text(), self.err.read_text())

    def _ask(self, *, block: bool) -> int | None:
        if self.code is None:
            self.code = self.server.ask({"wait": self.pid, "block": block})["code"]
        return self.code


@functools.cache
def server() -> Server:
    """One for all tests of a process."""
    made = Server()
    atexit.register(made.close)
    return made


def start(
    *arguments: str | Path,
    limit: int | None = None,
    module: str | None = None,
    cwd: str | Path | None = None,
    **extra: str,
) -> Command:
    """`diffexpo ARGUMENTS`, or `python -m MODULE ARGUMENTS`, in a folder, with `extra` in its environment and no file longer than `limit` bytes."""
    return server().start([str(argument) for argument in arguments], extra, limit, module, cwd)


def command(*arguments: str | Path, limit: int | None = None, arm: str | None = None) -> Done:
    """`diffexpo ARGUMENTS` until it ends; with `arm` the limit holds once a path matches that pattern."""
    running = start(*arguments, limit=None if arm else limit)
    while arm is not None and running.poll() is None:
        if glob.glob(arm):
            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            break
        time.sleep(0.001)
    return running.wait()


def diffexpo(*arguments: str | Path, check: bool = True) -> Done:
    """`diffexpo ARGUMENTS`, which must succeed unless `check` is false."""
    done = command(*arguments)
    if check:
        assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    return done


def kill_when(
    arguments: list[str], ready: Callable[[], bool], signal_number: int, timeout: float = 200.0
) -> int:
    """Start the command, send the signal to its group as soon as `ready()` is true, return the exit code."""
    running = start(*arguments)
    began = time.monotonic()
    while running.poll() is None and not ready() and time.monotonic() - began < timeout:
        time.sleep(0.002)
    if running.poll() is None:
        os.killpg(running.pid, signal_number)
    return running.wait().code


def in_two_processes(*arguments: str | Path) -> None:
    """The command in two processes that know each other as torchrun's do; both must succeed."""
    for done in two_processes(*arguments):
        assert done.code == 0, done.out[-3000:] + done.err[-3000:]


def module_in_two_processes(module: str, folder: Path) -> None:
    """`python -m module folder` as two ranks on this machine; both must end well."""
    for done in two_processes(folder, module=module):
        assert done.code == 0, done.out[-3000:] + done.err[-3000:]


def two_processes(*arguments: str | Path, module: str | None = None) -> list[Done]:
    """A command or module in two processes as a launcher starts them, and how each ended, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(*arguments, module=module, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]
    return [running.wait() for running in ranks]
