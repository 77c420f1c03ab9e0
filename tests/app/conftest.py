"""The tiny world, and real commands in processes of their own that need not import everything again."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.world import environment, world

__all__ = ["world"]

ROOT = Path(__file__).resolve().parents[2]


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


Command = Callable[..., Done]


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """command(argument, ..., limit=bytes, arm=pattern) runs `diffexpo` (see forkserver.py)."""
    folder = tmp_path_factory.mktemp("commands")
    numbers = itertools.count()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.app.forkserver"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None

    def run(*arguments: str | Path, limit: int | None = None, arm: str | None = None) -> Done:
        number = next(numbers)
        out, err = folder / f"{number}.out", folder / f"{number}.err"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(folder),
            "out": str(out),
            "err": str(err),
            "limit": limit,
            "arm": arm,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the fork server ended"
        return Done(json.loads(answer)["code"], out.read_text(), err.read_text())

    yield run
    server.stdin.close()
    assert server.wait(timeout=30) == 0
    server.stdout.close()
