"""What all clients of a score server together may take: bytes, pixels and time, each bounded and given back."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from PIL import Image

from diffexpo.config.rewards import ServiceConfig
from diffexpo.rewards import batcher, server
from diffexpo.rewards.remote import RemoteReward
from tests.served import Served

FLOOD = io.BytesIO()
Image.new("1", (4096, 4096)).save(FLOOD, "PNG")
SMALL = io.BytesIO()
Image.new("RGB", (12, 10)).save(SMALL, "PNG")


class Slow:
    """A scorer that waits for its gate and remembers its batches."""

    name, version, scale = "judge", "v1", "points"

    def __init__(self) -> None:
        self.batches: list[tuple[str, ...]] = []
        self.gate = threading.Event()

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        self.batches.append(tuple(prompts))
        self.gate.wait(10)
        return images.mean(dim=(1, 2, 3))


def ask(url: str, *items: tuple[str, bytes]) -> tuple[int, Any]:
    """Status and answer to a request for (prompt, image)s."""
    sent = [
        {"id": f"{number}-{prompt}", "prompt": prompt, "image": base64.b64encode(data).decode()}
        for number, (prompt, data) in enumerate(items)
    ]
    body = json.dumps({"protocol": 1, "items": sent}).encode()
    request = urllib.request.Request(f"{url}/score", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_flood_of_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(server, "decode_png", lambda text: decoded.append(text))
    with Served(Slow(), "python") as served:
        status, reply = ask(served.url, *(("flood", FLOOD.getvalue()) for _ in range(20)))
    assert (status, decoded) == (413, [])
    assert reply["error"] == f"{20 * 4096**2} pixels, at most {2**26} are read; send fewer images"


def test_one_image_beyond_the_bound_costs_its_row_alone() -> None:
    large = io.BytesIO()
    Image.new("1", (4097, 4096)).save(large, "PNG")
    scorer = Slow()
    scorer.gate.set()
    with Served(scorer, "python") as served:
        status, reply = ask(served.url, ("large", large.getvalue()), ("small", SMALL.getvalue()))
    assert status == 200 and reply["scores"] == {"0-large": None, "1-small": 0.0}
    assert "more than 16 megapixels" in reply["errors"]["0-large"]


def test_requests_wait_for_the_pixels_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PIXELS", 250)
    scorer = Slow()
    with Served(scorer, "python") as served, ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(ask, served.url, ("a", SMALL.getvalue()), ("b", SMALL.getvalue())) for _ in range(4)
        ]
        while not scorer.batches:
            time.sleep(0.01)
        time.sleep(0.2)
        assert served.pixels._held == 240
        scorer.gate.set()
        assert [job.result()[0] for job in jobs] == [200] * 4
        until = time.monotonic() + 30
        while served.pixels._held or served.bytes._held:  # given back once the answer has been sent
            assert time.monotonic() < until, (served.pixels._held, served.bytes._held)
            time.sleep(0.01)


def test_a_batch_holds_no_more_pixels_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "BATCH_PIXELS", 250)
    scorer = Slow()
    scorer.gate.set()
    with Served(scorer, "python") as served:
        status, reply = ask(served.url, *((str(number), SMALL.getvalue()) for number in range(5)))
    assert status == 200 and len(reply["scores"]) == 5
    assert max(map(len, scorer.batches)) == 2


def test_who_has_waited_too_long_is_told_and_not_scored_later() -> None:
    scorer = Slow()
    with Served(scorer, "python", timeout_s=0.2) as served:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, served.url, ("first", SMALL.getvalue()))
            while not scorer.batches:
                time.sleep(0.01)
            status, reply = ask(served.url, ("second", SMALL.getvalue()))
            assert status == 503 and reply["error"].startswith("no score within 0.2 s")
            assert first.result()[0] == 503
        scorer.gate.set()
        assert ask(served.url, ("third", SMALL.getvalue()))[0] == 200
    assert scorer.batches == [("first",), ("third",)]


def test_a_body_that_breaks_off_gives_its_bytes_back() -> None:
    with Served(Slow(), "python") as served:
        with socket.create_connection(("127.0.0.1", served.port)) as sender:
            head = "POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n"
            sender.sendall(head.encode() + b"x" * 70_000)
            while not served.bytes._held:
                time.sleep(0.01)
            sender.shutdown(socket.SHUT_WR)
            answer = sender.makefile("rb").read()
        assert b" 400 " in answer and b"the body ended after 70000 of 99999 bytes" in answer
        assert served.bytes._held == 0


def test_a_client_cuts_a_flood_of_its_own_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_PIXELS", 250)
    scorer = Slow()
    scorer.gate.set()
    with Served(scorer, "python") as served:
        far = RemoteReward("judge", served.url, ServiceConfig(timeout_s=20.0, retry_s=0.0))
        scores = far.score(torch.ones(5, 3, 10, 12), list("abcde"))
    assert scores.tolist() == [1.0] * 5
