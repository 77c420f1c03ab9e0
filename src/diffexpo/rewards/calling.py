"""Calls to scorers behind HTTP: JSON in, JSON out, one deadline a call, repeated within a time, failures
counted against a budget."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NoReturn, Self, TypeVar
from urllib.parse import urlsplit

import httpx2
import numpy as np
from PIL import Image
from torch import Tensor

from diffexpo.bounded.texts import parse_json
from diffexpo.config.rewards import ServiceConfig
from diffexpo.config.rewards.groups import address_problem
from diffexpo.errors import ConfigError, MissingError, RewardError, ScorerStoppedError
from diffexpo.rewards.images import check_lengths, to_bytes

_log = logging.getLogger("diffexpo")
Result = TypeVar("Result")
Item = TypeVar("Item")

CONCURRENCY = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
MAX_REPLY_BYTES, MAX_DETAIL_BYTES = 16 * 1024 * 1024, 2000
REFUSED_INPUT = (400, 413, 415, 422)
PASSING = (408, 425, 429)
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
BUDGET_WINDOW, BUDGET_FROM = 256, 20


class CallFailedError(RewardError):
    """A call without an answer. `can_retry`: it may succeed later, `is_refused_input`: another input may."""

    def __init__(
        self, reason: str, *, can_retry: bool, is_refused_input: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.can_retry, self.is_refused_input, self.wait_s = can_retry, is_refused_input, wait_s


class CalledReward:
    """What scorers behind an address share: a server that answers JSON, a budget of failures, and
    `concurrency` calls at once.

    `url` is `http://host:port` or `https://...`, with or without a path; paths are appended to it.
    Redirections are not followed: they would carry the key to another host. Addresses of this machine are
    reached without a proxy.

    Raises:
        ConfigError: not such an address, or one with a password in it.
        MissingError: the key's variable is not set.
    """

    cache_facts: Mapping[str, str] = {}
    """What scores depend on besides image, prompt, type, version and unit."""

    def __init__(
        self, name: str, url: str, service: ServiceConfig | None = None, concurrency: int | None = None
    ) -> None:
        self.name = name
        self.url = check_url(name, url)
        self.num_retries = 0
        self._service = service or ServiceConfig()
        self._concurrency = concurrency or CONCURRENCY
        self.budget = FailureBudget(name, self._service)
        variable = self._service.api_key_env
        self._key = os.environ.get(variable, "").strip() if variable else ""
        if variable and not self._key:
            reason = f"service.api_key_env names {variable}, which is not set in the environment"
            raise MissingError(f"reward {name!r}: {reason}; export the key there")
        headers = dict.fromkeys(("Accept", "Content-Type"), "application/json")
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.Client(
            headers=headers | {"Accept-Encoding": "identity"},
            timeout=self._service.timeout_s,
            trust_env=urlsplit(self.url).hostname not in LOCAL_HOSTS,
            # Each call has a connection of its own: a server may close one that waits.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    def call(self, path: str, payload: object = None) -> dict[str, object]:
        """The JSON object that the server answers: POST with a payload, else GET. One attempt.

        Raises:
            CallFailedError: no connection, no answer in time, an answer that is no JSON object, or an error
                status.
            ScorerStoppedError: the server refuses us (key, address), which no repetition changes.
        """
        method, body = ("GET", None) if payload is None else ("POST", json.dumps(payload).encode())
        url = self.url + path
        with _Deadline(self._service.timeout_s) as deadline:
            try:
                sent = self._client.stream(method, url, content=body, extensions={"trace": deadline.watch})
                with sent as response:
                    if not response.is_success:
                        raise self._refusal(url, response)
                    text = _read(response, MAX_REPLY_BYTES)
                    if len(text) > MAX_REPLY_BYTES:
                        raise httpx2.DecodingError(f"the answer is larger than {MAX_REPLY_BYTES} bytes")
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
                reason = f"{type(error).__name__}: {self._redacted(error)}"
                reason = f"none within {deadline.seconds:g} s" if deadline.is_over else reason
                raise CallFailedError(f"{url} gave no answer ({reason})", can_retry=True) from None
        if (reply := _object(text)) is None:
            answer = f"{self._redacted(text)[:80]!r}, which is no JSON object"
            raise CallFailedError(f"{url} answered {answer}", can_retry=True)
        # Nothing that a server says of itself may carry the key into messages and records.
        return {self._redacted(key): self._without_key(value) for key, value in reply.items()}

    def persist(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, repeated with growing pauses while it fails in a way that may pass and
        time is left; CallFailedError of the last attempt."""
        end, pause = time.monotonic() + self._service.retry_s, FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except CallFailedError as error:
                wait = max(pause, error.wait_s)
                left = end - time.monotonic()
                if not error.can_retry or wait > left:
                    raise
                if pause == FIRST_PAUSE_S:
                    _log.warning("reward %r: %s; trying again for up to %.0f s", self.name, error, left)
            self.num_retries += 1
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _first(self, ask: Callable[[], Result], expected: str) -> Result:
        """What the server says of itself; MissingError if nothing answers."""
        try:
            return self.persist(ask)
        except CallFailedError as error:
            raise MissingError(f"reward {self.name!r}: {error}; expected {expected}") from None

    def _pngs(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        check_lengths(self.name, images, prompts)
        return [png_base64(image) for image in to_bytes(images)]

    def _refusal(self, url: str, response: httpx2.Response) -> RewardError:
        """The exception for an error status, with what the server says of it."""
        try:
            detail = _shorten(self._redacted(_read(response, MAX_DETAIL_BYTES)[:MAX_DETAIL_BYTES]))
        except (httpx2.HTTPError, OSError):
            detail = ""
        status = response.status_code
        text = f"{url} answered status {status}: {detail}"
        if status >= 500 or status in PASSING:
            after = response.headers.get("Retry-After", "")
            return CallFailedError(text, can_retry=True, wait_s=float(after) if after.isdecimal() else 0.0)
        if status in REFUSED_INPUT:
            return CallFailedError(text, can_retry=False, is_refused_input=True)
        return ScorerStoppedError(
            f"reward {self.name!r}: {text}; expected an answer: check the address and the key"
        )

    def _redacted(self, text: object) -> str:
        """Servers repeat the key in their complaints."""
        shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        return shown.replace(self._key, "***") if self._key else shown

    def _without_key(self, value: object) -> object:
        """A value of JSON whose texts do not hold the key."""
        if isinstance(value, str):
            return self._redacted(value)
        if isinstance(value, list):
            return [self._without_key(inner) for inner in value]
        if isinstance(value, dict):
            return {self._redacted(key): self._without_key(inner) for key, inner in value.items()}
        return value


class FailureBudget:
    """Counts images without a score, and stops the run when they are too many."""

    def __init__(self, name: str, service: ServiceConfig) -> None:
        self.name, self._service = name, service
        self.num_asked = self.num_failed = 0
        self._recent: deque[bool] = deque(maxlen=BUDGET_WINDOW)
        self._reason = ""
        self._lock = threading.Lock()

    def add(self, num_asked: int, num_failed: int, reason: str = "") -> None:
        """Count images, then `check`; `reason` is why the failed ones failed."""
        with self._lock:
            self.num_asked += num_asked
            self.num_failed += num_failed
            self._recent.extend([True] * num_failed + [False] * (num_asked - num_failed))
            if num_failed:
                self._reason = reason
        self.check()

    def check(self) -> None:
        """Stop the run with a ScorerStoppedError if too many images failed."""
        with self._lock:
            recent, failed = len(self._recent), sum(self._recent)
        share, most = self._service.max_failed_fraction, self._service.max_failed
        if recent >= BUDGET_FROM and failed > share * recent:
            self._stop(f"{failed} of the last {recent}", f"max_failed_fraction = {share:g}")
        if most is not None and self.num_failed > most:
            self._stop(f"{self.num_failed} of {self.num_asked}", f"max_failed = {most}")

    def _stop(self, failed: str, limit: str) -> NoReturn:
        last = f"; the last one: {self._reason}" if self._reason else ""
        raise ScorerStoppedError(
            f"reward {self.name!r}: {failed} images got no score, more than service.{limit} allows{last}. "
            "Correct the scorer and resume, or raise the limit"
        )


def map_concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], concurrency: int
) -> list[Result]:
    """function(item) of each item, in order, up to `concurrency` at once; the first exception ends it."""
    if concurrency == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(concurrency, len(items))) as pool:
        return list(pool.map(function, items))


def png_base64(image: np.ndarray) -> str:
    """An image (H,W,3) uint8 as the base64 text of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def check_url(name: str, url: str) -> str:
    """The address without a slash at its end; ConfigError if it is none that a server is called at."""
    if problem := address_problem(url):
        raise ConfigError(f"reward {name!r}: {problem}")
    return url.rstrip("/")


class _Deadline:
    """Ends a call that is not over in time, whatever it waits for: a limit on each receive alone would bear a
    server that sends drop by drop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.is_over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._timer.cancel()

    def watch(self, name: str, facts: Mapping[str, Any]) -> None:
        """Told by the client of what it does: keeps the connection."""
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = facts["return_value"].get_extra_info("socket")
            if self.is_over:
                self._end()

    def _end(self) -> None:
        self.is_over = True
        if self._socket is not None:
            with suppress(OSError):  # it may have ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


def _read(response: httpx2.Response, most: int) -> bytes:
    """The body up to a little more than `most` bytes."""
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > most:
            break
    return bytes(body)


def _shorten(text: str) -> str:
    """The message inside an error body, on one line."""
    inner = (_object(text) or {}).get("error", text)
    message = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(message).split())[:300]


def _object(text: str | bytes) -> dict[str, object] | None:
    """The JSON object of a text; None if it is none."""
    try:
        reply = parse_json(text)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None
