"""An HTTP server that strangers cannot exhaust: so many connections, and so much time for each request.

A connection has READ_S for a whole request, however slowly its bytes come, the wait for it included. Where
all places are taken, one that has read for PATIENCE_S makes room; while there is none, a new connection is
told to come again (503). So slow senders cost honest clients a repetition, and no thread.
"""

from __future__ import annotations

import io
import logging
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_log = logging.getLogger("diffexpo")
READ_S = 30.0
PATIENCE_S = 1.0
_AWAY = b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class BoundedServer(ThreadingHTTPServer):
    """A server of `most` connections at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], most: int, read_s: float
    ) -> None:
        self.read_s = read_s
        self._most = most
        self._open: set[Any] = set()
        self._reading: dict[Any, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, or turn it away."""
        if self._admit(request):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.settimeout(0)
            request.sendall(_AWAY)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """End a connection; its place is free."""
        with self._lock:
            self._open.discard(request)
            self._reading.pop(request, None)
        super().shutdown_request(request)

    def reads(self, request: Any, is_reading: bool) -> None:
        """Note that a connection waits for its next request from now on, or has one."""
        with self._lock:
            self._reading.pop(request, None)
            if is_reading and request in self._open:
                self._reading[request] = time.monotonic()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that fails is logged for debugging only."""
        _log.debug("connection with %s failed", client_address, exc_info=True)

    def _admit(self, request: Any) -> bool:
        with self._lock:
            if len(self._open) >= self._most and not self._make_room():
                return False
            self._open.add(request)
            self._reading[request] = time.monotonic()
            return True

    def _make_room(self) -> bool:
        """End the connection that has read longest, if that is long enough."""
        slowest = min(self._reading, key=self._reading.__getitem__, default=None)
        if slowest is None or time.monotonic() - self._reading[slowest] < PATIENCE_S:
            return False
        del self._reading[slowest]
        self._open.discard(slowest)
        with suppress(OSError):  # its thread wakes, and closes it
            slowest.shutdown(socket.SHUT_RDWR)
        return True


class BoundedHandler(BaseHTTPRequestHandler):
    """One connection, whose requests each have to be there in time."""

    server: BoundedServer
    timeout = READ_S  # of what is sent; what is read has its own

    def setup(self) -> None:
        super().setup()
        self._stream = _Timed(self.connection)
        self.rfile = io.BufferedReader(self._stream)

    def handle_one_request(self) -> None:
        self.server.reads(self.connection, True)
        self._stream.until = time.monotonic() + self.server.read_s
        super().handle_one_request()

    def done_reading(self) -> None:
        """The request is whole: the time for it no longer counts."""
        self.server.reads(self.connection, False)
        self.connection.settimeout(self.timeout)


class _Timed(io.RawIOBase):
    """What a socket receives until a point in time; TimeoutError after it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.until = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not come in time")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)
