"""One signal stops in order, two at once."""

import signal
import subprocess
import sys
import time

import pytest

from diffexpo.errors import Interrupted
from diffexpo.training.signals import StopSignal

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_at_the_next_check_and_the_old_handler_returns(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(
            Interrupted, match=f"stopped by {number.name}; everything so far is saved"
        ) as caught:
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
