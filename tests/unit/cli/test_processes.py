"""`--processes`: what each process is told, and how the command ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffexpo.assembly import ConfigError
from diffexpo.cli import processes


def use(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let the processes run a script in place of diffexpo; its arguments are those of the command."""
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return real([sys.executable, "-c", script, *command[3:]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(processes.subprocess, "Popen", start)


def test_each_process_gets_its_rank_and_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT")
    use(
        monkeypatch,
        "import os, sys, pathlib\n"
        f"told = ' '.join(os.environ[name] for name in {names!r})\n"
        "pathlib.Path(sys.argv[2], os.environ['RANK']).write_text(told)",
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert processes.run_in_processes(["run", str(tmp_path)], 3) == 0
    told = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [each[:5] for each in told] == [[str(r), str(r), "3", "127.0.0.1", "2"] for r in range(3)]
    assert len({each[5] for each in told}) == 1


@pytest.mark.parametrize(("accelerators", "cores", "expected"), [(0, 1, 1), (0, 2, 2), (0, 64, 4), (8, 2, 8)])
def test_auto_is_one_for_each_gpu_or_a_few_for_the_cores(
    monkeypatch: pytest.MonkeyPatch, accelerators: int, cores: int, expected: int
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerators > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: accelerators)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert processes.number_of_processes("auto") == expected
    assert processes.number_of_processes("3") == 3


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match='expected a number from 1 on, or "auto"'):
        processes.number_of_processes(wanted)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((4, 75), 4), ((0, 2), 2), ((-9, 4), 4), ((0, -15), 0), ((-9, 0), 137)],
)
def test_the_command_ends_as_the_first_process_does(
    monkeypatch: pytest.MonkeyPatch, codes: tuple[int, int], expected: int
) -> None:
    use(
        monkeypatch,
        f"import os, sys\ncode = {codes!r}[int(os.environ['RANK'])]\n"
        "os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)",
    )
    assert processes.run_in_processes(["run"], 2) == expected


def test_those_that_a_failed_process_leaves_waiting_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE_S", 0.2)
    use(monkeypatch, "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)")
    began = time.monotonic()
    assert processes.run_in_processes(["run"], 2) == 3
    assert time.monotonic() - began < 60


def test_sigterm_reaches_all_processes(tmp_path: Path) -> None:
    """In a process of its own, since the signal goes to it."""
    inner = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        "time.sleep(600)"
    )
    outer = (
        "import subprocess, sys\nfrom diffexpo.cli import processes\nreal = subprocess.Popen\n"
        "processes.subprocess.Popen = lambda command, **rest: real([sys.executable, '-c', sys.argv[1]], **rest)\n"
        "sys.exit(processes.run_in_processes(['run'], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", outer, inner], stdin=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=60) == 75
