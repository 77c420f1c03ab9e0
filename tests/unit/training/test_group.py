"""Processes that wait for one another: as long as it takes, but not for one that is gone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest

from diffexpo.errors import ConfigError
from diffexpo.training.group import Door, Group, open_door
from tests.commands import Command, Done, start

SOON_S = 30
"""For what takes a few seconds on an idle machine."""


def start_two(what: str) -> list[Command]:
    """Two members; both have met when this returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    module = "tests.unit.training.member"
    ranks = [start(what, module=module, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]
    wait_for(lambda: all("ready" in one.out.read_text() or one.poll() is not None for one in ranks), 120)
    return ranks


def wait_for(happens: Callable[[], bool], seconds: float = SOON_S) -> None:
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def ended(running: Command, seconds: float = SOON_S) -> Done:
    wait_for(lambda: running.poll() is not None, seconds)
    return running.wait()


def test_a_wait_is_longer_than_a_collective_may_take() -> None:
    for done in [one.wait() for one in start_two("slow")]:
        assert done.code == 0, done.err


def test_what_differs_is_named_by_all() -> None:
    for done in [one.wait() for one in start_two("differ")]:
        assert done.code == 2
        assert "the run folder is /tmp/0 in process 0 but /tmp/1 in process 1; start them alike" in done.err


@pytest.mark.parametrize("what", ["draw", "wait", "reduce"])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_and_the_others_leave_resumable(what: str, killed: int) -> None:
    ranks = start_two(what)
    os.kill(ranks[killed].pid, signal.SIGKILL)
    other = ended(ranks[1 - killed])
    assert other.code == 75, other.err
    assert f"process {killed} (pid {ranks[killed].pid} on {socket.gethostname()}) was killed" in other.err
    assert ended(ranks[killed]).code == -signal.SIGKILL


@pytest.mark.parametrize("what", ["draw", "long"])
def test_nothing_is_said_of_the_others_where_all_are_interrupted(what: str) -> None:
    ranks = start_two(what)
    for one in ranks:
        os.kill(one.pid, signal.SIGINT)
    for done in map(ended, ranks):
        assert done.code == 75
        assert "stopped by SIGINT; everything so far is saved" in done.err
        assert "process" not in done.err


def test_an_error_that_all_find_is_said_once_by_each() -> None:
    for done in map(ended, start_two("differ")):
        assert "ended with" not in done.err and "saves and leaves" not in done.err


def test_who_is_interrupted_alone_is_named_by_the_others() -> None:
    ranks = start_two("draw")
    os.kill(ranks[1].pid, signal.SIGTERM)
    first, second = map(ended, ranks)
    assert (first.code, second.code) == (75, 75)
    who = f"process 1 (pid {ranks[1].pid} on {socket.gethostname()})"
    assert f"stopped because {who} was interrupted; everything so far is saved" in first.err
    assert "process" not in second.err


@pytest.mark.parametrize("what", ["wait", "reduce"])
def test_a_stopped_process_is_named_and_a_second_signal_ends_who_waits(what: str) -> None:
    ranks = start_two(what)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        wait_for(lambda: f"process 1 (pid {ranks[1].pid}" in ranks[0].err.read_text())
        assert "has not answered for" in ranks[0].err.read_text() and ranks[0].poll() is None
        os.kill(ranks[0].pid, signal.SIGTERM)
        wait_for(lambda: "a second signal quits at once" in ranks[0].err.read_text())
        time.sleep(1.1)  # within a second it would be a launcher's echo
        os.kill(ranks[0].pid, signal.SIGTERM)
        assert ended(ranks[0]).code == 75
    finally:
        os.kill(ranks[1].pid, signal.SIGCONT)
    # what was stopped goes on, and finds itself alone
    assert ended(ranks[1]).code == 75


def test_one_process_may_be_continued() -> None:
    ranks = start_two("slow")
    os.kill(ranks[1].pid, signal.SIGSTOP)
    wait_for(lambda: "has not answered for" in ranks[0].err.read_text() or ranks[0].poll() is not None)
    os.kill(ranks[1].pid, signal.SIGCONT)
    assert [one.wait().code for one in ranks] == [0, 0]


def test_texts_are_exchanged_in_the_order_of_ranks_and_strangers_are_not_let_in() -> None:
    door, listener = open_door("127.0.0.1")
    stranger = socket.create_connection(("127.0.0.1", door.port))
    stranger.sendall(b"not the word 1".ljust(64))
    found: dict[int, list[list[str]]] = {}

    def member(rank: int) -> None:
        group = Group(rank, 3, door, listener if rank == 0 else None)
        found[rank] = [group.exchange(f"{rank} {k} \n\u00fc") for k in range(20)]
        group.close(None)

    members = [threading.Thread(target=member, args=(rank,)) for rank in (1, 2, 0)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(timeout=SOON_S)
    stranger.close()
    assert found == {rank: [[f"{k} {n} \n\u00fc" for k in range(3)] for n in range(20)] for rank in range(3)}


def test_a_door_that_nobody_opens_is_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        door = Door(["127.0.0.1"], free.getsockname()[1], "word")
    with pytest.raises(
        ConfigError, match=r"process 1 does not reach process 0 at 127\.0\.0\.1:\d+ .*open the"
    ):
        Group(1, 2, door)
