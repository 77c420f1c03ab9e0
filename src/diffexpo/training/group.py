"""The processes of a run beside torch's collectives: what they tell one another, who is silent, who is gone.

Every process keeps a connection to the first, over which it waits for the others and exchanges small texts.
A wait has no time limit, so one process may import a data set or evaluate for hours, and it can be ended by a
signal, which a collective cannot. A connection that closes without a farewell is a process that died: the
others say which and leave, after a few seconds by force, because a collective would wait for it forever. One
that is stopped or unreachable is named and waited for.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from diffexpo.bounded.texts import parse_json
from diffexpo.errors import EXIT_INTERRUPTED, ConfigError, Interrupted

BEAT_S, SILENCE_S, AGAIN_S = 1.0, 20.0, 60.0
"""How often a process says that it is there; after how long a silent one is named, and named again."""
GRACE_S, FAREWELL_GRACE_S = 3.0, 30.0
"""How long a process may take to save and end after another died, or said farewell."""
NOTICE_S = 2.0
"""After how long a farewell is told by who has not ended too: a signal to all, or an error that all find,
needs no word about the others."""
_JOIN_S, _GREETING = 120.0, 64


class Door(NamedTuple):
    """Where the first process is to be reached, and the word that lets one in."""

    hosts: list[str]
    port: int
    word: str


def open_door(host: str) -> tuple[Door, socket.socket]:
    """A door of this process, known to the others as `host` or by its name."""
    listener = socket.create_server(("", 0), backlog=1024)
    return Door([host, socket.gethostname()], listener.getsockname()[1], secrets.token_hex(16)), listener


class Group:
    """This process among `size`, joined through the first one's door.

    Args:
        door: The same for all.
        listener: Of the first process.
    Raises:
        ConfigError: the first process cannot be reached, or not all came.
    """

    def __init__(self, rank: int, size: int, door: Door, listener: socket.socket | None = None) -> None:
        self.rank, self.size = rank, size
        self.lost = ""
        self.names: dict[int, str] = {}
        # Told that a process is gone; returns whether this one did not know already that it has to stop.
        self.on_loss: Callable[[str], bool] = lambda text: True
        self._number = 0
        self._told: dict[int, dict[int, str]] = {}  # number of an exchange -> text by rank
        self._changed = threading.Condition()
        self._is_closing = False
        self._farewells: set[int] = set()
        self._peers = self._admit(door, listener) if listener is not None else self._enter(door)
        self._sending = {other: threading.Lock() for other in self._peers}
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        for other in self._peers:
            self._start(self._listen, other)
        self._start(self._beat)
        self.names = dict(enumerate(self.exchange(f"pid {os.getpid()} on {socket.gethostname()}")))

    def exchange(self, text: str) -> list[str]:
        """Every process's text in rank order, on all. Interrupted if one is gone."""
        self._number += 1
        if self.rank:
            self._send(0, {"number": self._number, "text": text})
        else:
            self._take(self._number, 0, text)
        with self._changed:
            while len(self._told.get(self._number, ())) < self.size:
                self.check()
                self._changed.wait(0.5)
            told = self._told.pop(self._number)
        return [told[rank] for rank in range(self.size)]

    def check(self) -> None:
        """Raise Interrupted if a process is gone."""
        if self.lost:
            raise Interrupted(f"{self.lost}; everything so far is saved")

    def explain(self, error: Exception) -> Exception:
        """What to raise for a failed collective: that a process is gone, if one is."""
        until = time.monotonic() + GRACE_S / 2
        while not self.lost and time.monotonic() < until:
            time.sleep(0.02)
        return Interrupted(f"{self.lost}; everything so far is saved") if self.lost else error

    def close(self, error: BaseException | None) -> None:
        """Say farewell, with why; without an error all leave together."""
        if error is None and not self.lost:
            self.exchange("")
        self._is_closing = True
        why = "" if error is None else f"ended with {type(error).__name__}: {error}"
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            why = "was interrupted"
        for other in self._peers:
            self._send(other, {"farewell": self.rank, "why": why})
        for peer in self._peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_WR)  # the other side reads what was sent, then the end

    # ---- coming together -----------------------------------------------------------------------------------

    def _admit(self, door: Door, listener: socket.socket) -> dict[int, socket.socket]:
        peers: dict[int, socket.socket] = {}
        until = time.monotonic() + _JOIN_S
        with listener:
            while len(peers) < self.size - 1:
                listener.settimeout(max(0.1, until - time.monotonic()))
                try:
                    peer, _ = listener.accept()
                except TimeoutError as error:
                    missing = sorted(set(range(1, self.size)) - set(peers))
                    raise ConfigError(
                        f"processes {missing} did not reach process 0 at {door.hosts[0]}:{door.port}; open "
                        "the ports between the machines, or start all of them with one launcher"
                    ) from error
                rank = _greeted(peer, door)
                if rank is None:
                    peer.close()
                else:
                    peers[rank] = peer
        return peers

    def _enter(self, door: Door) -> dict[int, socket.socket]:
        problem: OSError | None = None
        for host in door.hosts:
            try:
                peer = socket.create_connection((host, door.port), timeout=_JOIN_S / 2)
            except OSError as error:
                problem = error
                continue
            peer.settimeout(None)
            peer.sendall(f"{door.word} {self.rank}".ljust(_GREETING).encode())
            return {0: peer}
        raise ConfigError(
            f"process {self.rank} does not reach process 0 at {door.hosts[0]}:{door.port} ({problem}); open "
            "the ports between the machines"
        ) from problem

    # ---- threads -------------------------------------------------------------------------------------------

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, name="group", daemon=True).start()

    def _listen(self, other: int) -> None:
        peer = self._peers[other]
        with suppress(OSError, ValueError), peer, peer.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                self._heard[other] = time.monotonic()
                if line.strip():
                    self._hear(parse_json(line))
        if other not in self._farewells and not self._is_closing:
            self._lose(other, "was killed, or its machine is gone", is_orderly=False)

    def _hear(self, message: dict[str, Any]) -> None:
        if "text" in message and self.rank == 0:
            self._take(message["number"], message["rank"], message["text"])
        elif "texts" in message:
            with self._changed:
                self._told[message["number"]] = dict(enumerate(message["texts"]))
                self._changed.notify_all()
        elif "lost" in message:
            self._lose(message["lost"], message["why"], message["is_orderly"])
        elif "farewell" in message:
            self._farewells.add(message["farewell"])
            if message["why"]:
                self._lose(message["farewell"], message["why"], is_orderly=True)

    def _take(self, number: int, rank: int, text: str) -> None:
        """On the first process: a text has arrived; with the last one all get all."""
        with self._changed:
            told = self._told.setdefault(number, {})
            told[rank] = text
            is_whole = len(told) == self.size
            texts = [told[one] for one in range(self.size)] if is_whole else []
            self._changed.notify_all()
        if is_whole:
            for other in self._peers:
                self._send(other, {"number": number, "texts": texts})

    def _lose(self, rank: int, why: str, is_orderly: bool) -> None:
        if self.lost or self._is_closing:
            return
        self.lost = f"process {rank} ({self._name(rank)}) {why}"
        is_news = self.on_loss(self.lost)
        with self._changed:
            self._changed.notify_all()
        if self.rank == 0:
            for other in self._peers:
                if other != rank:
                    self._send(other, {"lost": rank, "why": why, "is_orderly": is_orderly})
        # A collective waits for the one that is gone; nothing on the disk depends on an orderly end.
        self._start(self._leave_by_force, is_orderly, is_news or not is_orderly)

    def _leave_by_force(self, is_orderly: bool, is_told: bool) -> None:
        notice, grace = (NOTICE_S, FAREWELL_GRACE_S) if is_orderly else (0.0, GRACE_S)
        time.sleep(notice)
        if is_told and not self._is_closing:
            os.write(2, f"\n{self.lost}: process {self.rank} saves and leaves too\n".encode())
        time.sleep(grace - notice)
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)

    def _beat(self) -> None:
        named = dict.fromkeys(self._peers, -AGAIN_S)
        while not self._is_closing:
            time.sleep(BEAT_S)
            now = time.monotonic()
            for other in self._peers:
                self._send(other, None)
                silent = now - self._heard[other]
                is_gone = other in self._farewells
                if not is_gone and silent > SILENCE_S and now - named[other] > AGAIN_S:
                    named[other] = now
                    told = (
                        f"\nprocess {other} ({self._name(other)}) has not answered for {silent:.0f} s: it is "
                    )
                    told += "stopped, or its machine is not reachable; the others wait for it\n"
                    os.write(2, told.encode())

    def _send(self, other: int, message: dict[str, Any] | None) -> None:
        line = b"\n" if message is None else json.dumps({"rank": self.rank, **message}).encode() + b"\n"
        # where it fails the listening thread finds out why
        with suppress(OSError), self._sending[other]:
            self._peers[other].sendall(line)

    def _name(self, rank: int) -> str:
        return self.names.get(rank, "not known yet")


def _greeted(peer: socket.socket, door: Door) -> int | None:
    """The rank of who comes in; None for one who does not know the word."""
    with suppress(ValueError, OSError):
        peer.settimeout(10)
        word, rank = peer.recv(_GREETING, socket.MSG_WAITALL).decode().split()
        peer.settimeout(None)
        if secrets.compare_digest(word, door.word):
            return int(rank)
    return None
