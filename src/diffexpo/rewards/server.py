"""Serves a scorer over HTTP with the standard library alone: the other side of `remote.py`.

Each connection has a thread; one thread scores. Images of requests that arrive within a few milliseconds of
each other are scored in one batch. The server reads JSON and PNG only, and listens on this machine only
unless told otherwise. Connections, bytes, pixels and time are bounded for all clients together.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import threading
import time

import numpy as np

from diffexpo.bounded.images import opened, pixels_of
from diffexpo.bounded.texts import parse_json
from diffexpo.errors import ConfigError, DiffexpoError, ImportFormatError
from diffexpo.rewards.batcher import Batcher, Budget, RefusedError, Share, Ticket
from diffexpo.rewards.connections import READ_S, BoundedHandler, BoundedServer
from diffexpo.rewards.remote import PROTOCOL
from diffexpo.types import Reward

_log = logging.getLogger("diffexpo")
FORMATS = ("PNG",)
MAX_PIXELS = 2**26
"""Pixels of all images that wait or are scored: as bytes they take 192 MiB."""
HELD_REQUESTS = 4
"""Bodies of the largest size that are held at once."""
_CHUNK = 2**16
_PARSING = threading.Lock()
"""One body at a time: parsing holds it three times."""


class ScoreServer(BoundedServer):
    """A scorer of a type (`kind`) behind `GET /health`, `GET /version` and `POST /score`.

    `host` is the address to listen on; anything but this machine's own lets others in, without a password.
    `port` 0 takes a free one. A batch that has not `batch_size` images waits `wait_ms` for more; `max_mib` is
    the largest request body, MiB; at most `connections` are open at once, a request has to come within
    `read_s` and is scored within `timeout_s`, seconds.

    Raises:
        ConfigError: the address cannot be listened on, or a score depends on the other images of its call.
    """

    # Many parameters because each is an option of `diffexpo rewards serve`.
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
        connections: int = 64,
        read_s: float = READ_S,
        timeout_s: float = 600.0,
    ) -> None:
        if getattr(reward, "is_groupwise", False):
            raise ConfigError(
                f"reward {reward.name!r} compares the images of a prompt with each other; a server mixes the "
                "images of several requests in one batch, so it cannot serve it: use it in the run itself"
            )
        self.facts: dict[str, object] = {"protocol": PROTOCOL, "name": reward.name, "type": kind}
        self.facts |= {"version": reward.version, "scale": reward.scale}
        try:
            super().__init__((host, port), ScoreHandler, connections, read_s)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port or --host"
            ) from None
        self.max_bytes = int(max_mib * 1024 * 1024)
        self.timeout_s = timeout_s
        self.bytes = Budget(HELD_REQUESTS * self.max_bytes, "bytes")
        self.pixels = Budget(MAX_PIXELS, "pixels")
        self.batcher = Batcher(reward, batch_size, wait_ms)
        self.port = int(self.server_address[1])
        self.url = f"http://{host}:{self.port}"

    def close(self) -> None:
        """Stop listening and end the scoring thread."""
        self.server_close()
        self.batcher.close()


class ScoreHandler(BoundedHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "diffexpo"
    sys_version = ""
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
            with self.server.bytes.share() as share:
                self.reply(200, self.score(self.read(share)))
        except RefusedError as error:
            self.reply(error.status, {"error": str(error)})

    def read(self, share: Share) -> dict[str, object]:
        """The request, of whose bytes those that have come count."""
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
        body = self._body(int(length), share)
        self.close_connection = False
        try:
            with _PARSING:
                request = parse_json(body)
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON that can be read ({error})") from None
        if not isinstance(request, dict) or request.get("protocol") != PROTOCOL:
            raise RefusedError(400, f"expected a JSON object with protocol {PROTOCOL}")
        return request

    def _body(self, length: int, share: Share) -> bytearray:
        body = bytearray()
        while len(body) < length:
            part = self.rfile.read(min(_CHUNK, length - len(body)))
            if not part:
                raise RefusedError(400, f"the body ended after {len(body)} of {length} bytes")
            share.take(len(part))
            body += part
        self.done_reading()
        return body

    def score(self, request: dict[str, object]) -> dict[str, object]:
        """Scores of the items; null for an image without one, with the reason in `errors`."""
        items = _check_items(request.get("items"))
        errors: dict[str, str] = {}
        with self.server.pixels.share() as share:
            tickets = self._tickets(items, share, errors)
            self.server.batcher.submit(list(tickets.values()))
            found = self._wait(tickets)
        scores = {key: None if math.isnan(score) else score for key, score in found.items()}
        errors |= {key: "the scorer gave no finite number" for key, score in scores.items() if score is None}
        facts = {key: self.server.facts[key] for key in ("protocol", "name", "version")}
        return {**facts, "scores": {item["id"]: scores.get(item["id"]) for item in items}, "errors": errors}

    def _tickets(
        self, items: list[dict[str, str]], share: Share, errors: dict[str, str]
    ) -> dict[str, Ticket]:
        """The images by id, decoded once there is room for their pixels; what is none goes to `errors`."""
        num_pixels: dict[str, int] = {}
        for item in items:
            try:
                num_pixels[item["id"]] = count_pixels(item["image"])
            except (ValueError, ImportFormatError) as error:
                errors[item["id"]] = f"not a PNG that can be read ({error})"
        total = sum(num_pixels.values())
        if total > MAX_PIXELS:
            raise RefusedError(413, f"{total} pixels, at most {MAX_PIXELS} are read; send fewer images")
        share.take(total, self.server.timeout_s)
        tickets: dict[str, Ticket] = {}
        for item in (item for item in items if item["id"] in num_pixels):
            try:
                tickets[item["id"]] = Ticket(decode_png(item["image"]), item["prompt"])
            except ImportFormatError as error:
                errors[item["id"]] = f"not a PNG that can be read ({error})"
        return tickets

    def _wait(self, tickets: dict[str, Ticket]) -> dict[str, float]:
        """The scores by id; RefusedError if the scorer fails, or takes too long."""
        until = time.monotonic() + self.server.timeout_s
        try:
            return {
                key: ticket.score.result(max(0.0, until - time.monotonic()))
                for key, ticket in tickets.items()
            }
        except TimeoutError:
            reason = f"no score within {self.server.timeout_s:g} s"
            raise RefusedError(503, f"{reason}; send fewer images, or try again later") from None
        except DiffexpoError as error:
            raise RefusedError(500, f"the scorer failed: {error}") from None
        finally:
            for ticket in tickets.values():
                ticket.score.cancel()

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


def count_pixels(text: str) -> int:
    """How many pixels an image has, by its head alone; raises as `decode_png`."""
    with opened(_png(text), FORMATS) as image:
        return int(image.width * image.height)


def decode_png(text: str) -> np.ndarray:
    """The image (H,W,3) uint8 in the base64 text of a PNG; ValueError if it is not base64, ImportFormatError
    if it is no PNG, a damaged one, or one of more than 16 megapixels."""
    return pixels_of(_png(text), FORMATS)


def _png(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None


def _check_items(items: object) -> list[dict[str, str]]:
    if not isinstance(items, list) or not items:
        raise RefusedError(400, "items is not a list of images")
    objects = [item if isinstance(item, dict) else {} for item in items]
    if not all(isinstance(item.get(key), str) for item in objects for key in ("id", "prompt", "image")):
        raise RefusedError(400, "an item lacks id, prompt or image (each a string)")
    if len({item["id"] for item in items}) < len(items):
        raise RefusedError(400, "two items have one id")
    return items
