"""Serves a scorer over HTTP with the standard library alone: the other side of `remote.py`.

Each request has a thread; one thread scores. Images of requests that arrive within a few milliseconds of each
other are scored in one batch. The server reads JSON and PNG only, and listens on this machine only unless
told otherwise.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch

from diffexpo.bounded.images import pixels_of
from diffexpo.bounded.texts import parse_json
from diffexpo.errors import ConfigError, DiffexpoError, ImportFormatError, RewardError
from diffexpo.rewards.foreign import blame
from diffexpo.rewards.remote import PROTOCOL
from diffexpo.rewards.scoring import score_drawn
from diffexpo.types import Drawn, Reward

_log = logging.getLogger("diffexpo")
MAX_WAITING = 4096
IDLE_S = 60.0
FORMATS = ("PNG",)


class RefusedError(RewardError):
    """A request that is not answered with scores, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class _Ticket:
    image: np.ndarray
    prompt: str
    score: Future[float] = field(default_factory=Future)


class Batcher:
    """Scores tickets in batches, in one thread; a batch that is not full waits `wait_ms` for more."""

    def __init__(self, reward: Reward, batch_size: int, wait_ms: float) -> None:
        self.num_images = 0
        self._is_closing = False
        self._reward, self._batch_size, self._wait_s = reward, batch_size, wait_ms / 1000
        self._tickets: queue.Queue[_Ticket | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="scorer", daemon=True)
        self._thread.start()

    def submit(self, tickets: Sequence[_Ticket]) -> None:
        """Queue images for their scores; RefusedError (503) near the end or if too many are waiting."""
        if self._is_closing:
            raise RefusedError(503, "the server is stopping")
        if self._tickets.qsize() + len(tickets) > MAX_WAITING:
            raise RefusedError(503, f"{self._tickets.qsize()} images are waiting; try again later")
        for ticket in tickets:
            self._tickets.put(ticket)

    def close(self) -> None:
        """Score what is queued and end the thread."""
        self._is_closing = True
        self._tickets.put(None)
        self._thread.join()

    def _run(self) -> None:
        ticket = self._tickets.get()
        while ticket is not None:
            batch, until = [ticket], time.monotonic() + self._wait_s
            with suppress(queue.Empty):
                while len(batch) < self._batch_size:
                    ticket = self._tickets.get(timeout=max(until - time.monotonic(), 0.0))
                    if ticket is None:
                        break
                    batch.append(ticket)
            # Images of one size can be stacked.
            for shape in dict.fromkeys(ticket.image.shape for ticket in batch):
                self._score([one for one in batch if one.image.shape == shape])
            if ticket is not None:
                ticket = self._tickets.get()

    def _score(self, tickets: Sequence[_Ticket]) -> None:
        stacked = torch.from_numpy(np.stack([ticket.image for ticket in tickets]))
        images = stacked.permute(0, 3, 1, 2).float() / 255
        prompts = [ticket.prompt for ticket in tickets]
        self.num_images += len(tickets)
        try:
            # One bad request must not end the server, whatever the scorer raises.
            with blame(f"reward {self._reward.name!r}", "correct the scorer"):
                drawn = Drawn(images=images)
                scores = score_drawn([self._reward], drawn, prompts, batch_size=self._batch_size)
        except DiffexpoError as error:
            _log.error("%s", error)
            for ticket in tickets:
                ticket.score.set_exception(error)
        else:
            for ticket, score in zip(tickets, scores[self._reward.name].tolist(), strict=True):
                ticket.score.set_result(score)


class ScoreServer(ThreadingHTTPServer):
    """A scorer of a type (`kind`) behind `GET /health`, `GET /version` and `POST /score`.

    `host` is the address to listen on; anything but this machine's own lets others in, without a password.
    `port` 0 takes a free one. A batch that has not `batch_size` images waits `wait_ms` for more; `max_mib` is
    the largest request body, MiB.

    Raises:
        ConfigError: the address cannot be listened on, or a score depends on the other images of its call.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        reward: Reward,
        kind: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        batch_size: int = 64,
        wait_ms: float = 5.0,
        max_mib: float = 64.0,
    ) -> None:
        if getattr(reward, "is_groupwise", False):
            raise ConfigError(
                f"reward {reward.name!r} compares the images of a prompt with each other; a server mixes the "
                "images of several requests in one batch, so it cannot serve it: use it in the run itself"
            )
        self.facts: dict[str, object] = {"protocol": PROTOCOL, "name": reward.name, "type": kind}
        self.facts |= {"version": reward.version, "scale": reward.scale}
        try:
            super().__init__((host, port), ScoreHandler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port or --host"
            ) from None
        self.max_bytes = int(max_mib * 1024 * 1024)
        self.batcher = Batcher(reward, batch_size, wait_ms)
        self.port = int(self.server_address[1])
        self.url = f"http://{host}:{self.port}"

    def close(self) -> None:
        """Stop listening and end the scoring thread."""
        self.server_close()
        self.batcher.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that fails is logged for debugging only."""
        _log.debug("connection with %s failed", client_address, exc_info=True)


class ScoreHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "diffexpo"
    sys_version = ""
    timeout = IDLE_S
    server: ScoreServer

    def do_GET(self) -> None:
        """`/health` and `/version`."""
        if self.path == "/health":
            self.reply(200, {"status": "ok", "images": self.server.batcher.num_images})
        elif self.path == "/version":
            self.reply(200, self.server.facts)
        else:
            self.reply(404, {"error": f"{self.path} is not here; there are /health, /version and /score"})

    def do_POST(self) -> None:
        """`/score`."""
        try:
            self.reply(200, self.score(self.read()))
        except RefusedError as error:
            self.reply(error.status, {"error": str(error)})

    def read(self) -> dict[str, object]:
        # What is not read cannot be skipped: the connection ends with the answer.
        self.close_connection = True
        if self.path != "/score":
            raise RefusedError(404, f"{self.path} is not here; POST to /score")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(411, "Content-Length is missing; expected the size of the body")
        if int(length) > (most := self.server.max_bytes):
            raise RefusedError(
                413, f"the body has {length} bytes, at most {most} are read; send fewer images"
            )
        # Web pages cannot send this type to another site unasked.
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(415, "Content-Type is not application/json")
        body = self.rfile.read(int(length))
        self.close_connection = False
        try:
            request = parse_json(body)
        except ValueError:
            raise RefusedError(400, "the body is not JSON") from None
        if not isinstance(request, dict) or request.get("protocol") != PROTOCOL:
            raise RefusedError(400, f"expected a JSON object with protocol {PROTOCOL}")
        return request

    def score(self, request: dict[str, object]) -> dict[str, object]:
        """Scores of the items; null for an image without one, with the reason in `errors`."""
        items = _check_items(request.get("items"))
        errors: dict[str, str] = {}
        tickets: dict[str, _Ticket] = {}
        for item in items:
            try:
                tickets[item["id"]] = _Ticket(decode_png(item["image"]), item["prompt"])
            except (ValueError, ImportFormatError) as error:
                errors[item["id"]] = f"not a PNG that can be read ({error})"
        self.server.batcher.submit(list(tickets.values()))
        try:
            found = {key: ticket.score.result() for key, ticket in tickets.items()}
        except DiffexpoError as error:
            raise RefusedError(500, f"the scorer failed: {error}") from None
        scores = {key: None if math.isnan(score) else score for key, score in found.items()}
        errors |= {key: "the scorer gave no finite number" for key, score in scores.items() if score is None}
        facts = {key: self.server.facts[key] for key in ("protocol", "name", "version")}
        return {**facts, "scores": {item["id"]: scores.get(item["id"]) for item in items}, "errors": errors}

    def reply(self, status: int, body: dict[str, object]) -> None:
        """Send a JSON object."""
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        if status == 503:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are logged for debugging only."""
        _log.debug(format, *arguments)


def decode_png(text: str) -> np.ndarray:
    """The image (H,W,3) uint8 in the base64 text of a PNG; ValueError if it is not base64, ImportFormatError
    if it is no PNG, a damaged one, or one of more than 16 megapixels."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None
    return pixels_of(data, FORMATS)


def _check_items(items: object) -> list[dict[str, str]]:
    if not isinstance(items, list) or not items:
        raise RefusedError(400, "items is not a list of images")
    objects = [item if isinstance(item, dict) else {} for item in items]
    if not all(isinstance(item.get(key), str) for item in objects for key in ("id", "prompt", "image")):
        raise RefusedError(400, "an item lacks id, prompt or image (each a string)")
    if len({item["id"] for item in items}) < len(items):
        raise RefusedError(400, "two items have one id")
    return items
