"""Strangers who hold connections cost honest clients a repetition, and no thread."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from diffexpo.config.rewards import ServiceConfig
from diffexpo.rewards import connections
from diffexpo.rewards.jpeg import JpegCompressibility
from diffexpo.rewards.remote import RemoteReward
from tests.served import Served

HEAD = b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"


@contextmanager
def senders(port: int, count: int, start: bytes) -> Iterator[list[socket.socket]]:
    """Connections on which a request begins and does not end."""
    with ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(count)
        ]
        for one in opened:
            try:
                one.sendall(start)
            except OSError:
                continue  # turned away
        yield opened


@pytest.mark.parametrize(
    "start", [b"", b"POST /sc", HEAD + b"{"], ids=["silent", "in the head", "in the body"]
)
def test_slow_senders_cost_no_thread_and_honest_clients_are_served(
    start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PATIENCE_S", 0.2)
    before = threading.active_count()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scorer = JpegCompressibility("size")
    with (
        Served(scorer, "jpeg_compressibility", connections=4) as server,
        senders(server.port, 60, start),
    ):
        assert threading.active_count() - before <= 4 + 4  # the server's own two, and those that just end
        service = ServiceConfig(timeout_s=10.0, retry_s=30.0)
        far = RemoteReward("far", server.url, service)
        assert torch.equal(far.score(images, ["a", "b"]), scorer.score(images, ["a", "b"]))
        assert len(server._open) <= 4


def test_a_request_that_does_not_come_in_time_ends() -> None:
    with Served(JpegCompressibility("size"), "jpeg_compressibility", read_s=0.3) as server:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), 10) as sender:
            sender.sendall(HEAD)
            with pytest.raises(OSError):
                while time.monotonic() - began < 5:
                    sender.sendall(b"x")
                    time.sleep(0.02)
        assert time.monotonic() - began < 5


def test_a_client_between_two_requests_is_not_late() -> None:
    with Served(JpegCompressibility("size"), "jpeg_compressibility", read_s=1.0) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for _ in range(3):
            client.request("GET", "/health")
            with client.getresponse() as answer:
                assert (answer.status, answer.read()) == (200, b'{"status": "ok", "images": 0}')
            time.sleep(0.5)
        client.close()
