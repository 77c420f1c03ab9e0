"""One process a folder holds its lock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffexpo.errors import RunLockedError
from diffexpo.training.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from diffexpo.training.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
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
    with pytest.raises(RunLockedError, match=f"in use by process {holder.pid} on "), RunLock(tmp_path):
        pass
    holder.kill()
    finish(holder)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "run.lock").read_bytes() == b""


def test_the_lock_excludes_within_a_process_too_and_can_be_taken_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new" / "run")
    with lock, pytest.raises(RunLockedError, match=str(os.getpid())), RunLock(tmp_path / "new" / "run"):
        pass
    with lock:
        pass


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
        with pytest.raises(RunLockedError, match="another process"), RunLock(tmp_path):
            pass
