"""One process a folder; one signal stops in order, two at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffexpo.errors import Interrupted, RunLockedError
from diffexpo.training.lock import RunLock
from diffexpo.training.signals import StopSignal

HOLD = """
import sys, time
from pathlib import Path
from diffexpo.training.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
LOOP = """
import sys, time
from diffexpo.training.signals import StopSignal
with StopSignal(float(sys.argv[1])) as stop:
    print("ready", flush=True)
    while stop.received is None:
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(float(sys.argv[2]))
    stop.check()
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def finish(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=60)[1]


def test_a_second_process_is_refused_by_name_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    holder = start(HOLD, str(tmp_path))
    with pytest.raises(RunLockedError, match=f"in use by process {holder.pid} on "):
        RunLock(tmp_path).acquire()
    holder.kill()
    finish(holder)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_bytes() == b""


def test_the_lock_excludes_within_a_process_too_and_can_be_taken_again(tmp_path: Path) -> None:
    with RunLock(tmp_path / "new" / "run"), pytest.raises(RunLockedError, match=str(os.getpid())):
        RunLock(tmp_path / "new" / "run").acquire()
    RunLock(tmp_path / "new" / "run").acquire()


def test_a_program_started_by_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with RunLock(tmp_path):
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff"])
def test_a_holder_that_has_not_written_its_name_is_still_a_holder(tmp_path: Path, text: bytes) -> None:
    with RunLock(tmp_path):
        (tmp_path / "run.lock").write_bytes(text)
        with pytest.raises(RunLockedError, match="another process"):
            RunLock(tmp_path).acquire()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_at_the_next_check_and_the_old_handler_returns(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted, match=f"{number.name}.*--resume") as caught:
            stop.check()
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) == before
    assert "second signal" in capfd.readouterr().err


def test_a_second_signal_ends_at_once_with_75() -> None:
    process = start(LOOP, "0", "60")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "first\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert process.returncode == 75 and time.monotonic() - began < 20


def test_an_echo_of_the_first_signal_is_no_second_one() -> None:
    process = start(LOOP, "60", "0.5")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGINT)
    assert "Interrupted: stopped by SIGINT" in finish(process)
    assert process.returncode == 1


def test_under_a_launcher_echoes_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StopSignal().echo_seconds == 0.0
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert StopSignal().echo_seconds == 1.0
