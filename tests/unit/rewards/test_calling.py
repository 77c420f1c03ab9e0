"""One call after another: what is repeated, what is not, what stops the run, and that the key is written nowhere."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time

import pytest

from diffexpo.config.load import load_config
from diffexpo.config.rewards import ServiceConfig
from diffexpo.errors import ConfigError, MissingError, ScorerStoppedError
from diffexpo.rewards.calling import CalledReward, CallFailedError, FailureBudget, check_url, map_concurrently
from diffexpo.rewards.remote import RemoteReward
from tests.unit.rewards.scripted_server import Reply, ScriptedServer

QUICK = ServiceConfig(timeout_s=1.0, retry_s=0.0)


class Dripping:
    """A server that sends a byte of its answer every 20 ms: of the head without an end, or of the body."""

    def __init__(self, part: str) -> None:
        self._start = b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 9999\r\n\r\n" if part == "body" else b"X: ")
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def _answer(self) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(self._start)
            while not self._stop.wait(0.02):
                connection.sendall(b"x")

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()


def endpoint(url: str, **settings: object) -> CalledReward:
    return CalledReward("far", url, QUICK.model_copy(update=settings))


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:80", "ftp://host", "http://", "http://host:port", "http://host/?a=b", "http://host/#x", "x"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected an address such as"):
        check_url("far", url)


def test_a_password_in_the_address_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError, match="api_key_env") as found:
        check_url("far", "http://me:hunter2@host")
    assert "hunter2" not in str(found.value)


@pytest.mark.parametrize("url", ["http://me:hunter2@host", "http://host/v1?key=hunter2"])
def test_a_secret_in_the_settings_is_refused_before_anything_is_written(url: str) -> None:
    reward = f"[{{name: far, type: remote, path: '{url}'}}]"
    with pytest.raises(ConfigError, match=r"rewards\.0\.path holds a .*api_key_env") as found:
        load_config([], [f"rewards={reward}"], {})
    assert "hunter2" not in str(found.value)


def test_an_address_may_have_a_path() -> None:
    assert check_url("far", "https://host.example:9/v1/") == "https://host.example:9/v1"


@pytest.mark.parametrize(
    ("reply", "can_retry"),
    [
        (Reply(status=0), True),
        (Reply(b"<html>not JSON"), True),
        (Reply([1, 2]), True),
        (Reply(b"[" * 100_000), True),
        (Reply({"error": "busy"}, 503), True),
        (Reply({"error": "slow down"}, 429), True),
        (Reply({"error": {"message": "too big"}}, 413), False),
    ],
)
def test_failures_say_whether_they_may_pass(reply: Reply, can_retry: bool) -> None:
    with ScriptedServer(lambda path, body: reply) as server, pytest.raises(CallFailedError) as found:
        endpoint(server.url).call("/score", {})
    assert found.value.can_retry == can_retry
    assert found.value.is_refused_input != can_retry


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404])
def test_a_server_that_refuses_us_stops_the_run(status: int) -> None:
    away = Reply({"error": "no"}, status, {"Location": "http://127.0.0.1:1/elsewhere"})
    with ScriptedServer(lambda path, body: away) as server:
        with pytest.raises(ScorerStoppedError, match=f"status {status}: no"):
            endpoint(server.url).call("/score", {})
        assert len(server.seen) == 1


def test_a_late_answer_is_no_answer() -> None:
    def answer(path: str, body: object) -> Reply:
        time.sleep(0.4)
        return Reply({})

    with ScriptedServer(answer) as server, pytest.raises(CallFailedError, match="no answer"):
        endpoint(server.url, timeout_s=0.1).call("/score", {})


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_answer_drop_by_drop_is_late_as_well(part: str) -> None:
    with Dripping(part) as url:
        began = time.monotonic()
        with pytest.raises(CallFailedError, match=r"gave no answer \(none within 0.3 s\)"):
            endpoint(url, timeout_s=0.3).call("/score", {})
        assert time.monotonic() - began < 3


def test_calls_are_repeated_until_they_succeed() -> None:
    replies = [Reply(status=0), Reply(b"?"), Reply({}, 500), Reply({"fine": 1})]
    with ScriptedServer(lambda path, body: replies.pop(0)) as server:
        far = endpoint(server.url, retry_s=20.0)
        assert far.persist(lambda: far.call("/score", {})) == {"fine": 1}
    assert far.num_retries == 3


def test_calls_are_not_repeated_beyond_their_time_nor_where_it_is_useless() -> None:
    began = time.monotonic()
    with ScriptedServer(lambda path, body: Reply({}, 500, {"Retry-After": "3600"})) as server:
        far = endpoint(server.url, retry_s=5.0)
        with pytest.raises(CallFailedError, match="status 500"):
            far.persist(lambda: far.call("/score", {}))
        assert len(server.seen) == 1
    with ScriptedServer(lambda path, body: Reply({}, 400)) as server:
        far = endpoint(server.url, retry_s=5.0)
        with pytest.raises(CallFailedError, match="status 400"):
            far.persist(lambda: far.call("/score", {}))
        assert len(server.seen) == 1
    assert time.monotonic() - began < 4


def test_the_key_is_sent_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAR_KEY", "sk-secret")
    replies = [Reply({"error": "busy with sk-secret"}, 500), Reply({"error": "bad key sk-secret"}, 401)]
    with caplog.at_level(logging.DEBUG), ScriptedServer(lambda path, body: replies.pop(0)) as server:
        far = endpoint(server.url, api_key_env="FAR_KEY", retry_s=5.0)
        with pytest.raises(ScorerStoppedError, match=r"bad key \*\*\*") as found:
            far.persist(lambda: far.call("/score", {}))
        assert server.seen[0][2]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in caplog.text + str(found.value)
    assert "busy with ***" in caplog.text


def test_a_server_that_gives_the_key_as_its_version_gets_it_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "sk/secret")
    facts = {"protocol": 1, "name": "judge", "type": "python", "version": "v-sk/secret", "scale": "sk/secret"}
    body = json.dumps(facts).replace("sk/secret", "sk\\/secr\\u0065t").encode()
    with ScriptedServer(lambda path, sent: Reply(body)) as server:
        far = RemoteReward("far", server.url, QUICK.model_copy(update={"api_key_env": "FAR_KEY"}))
    assert far.version == "python v-***" and far.scale == "***"


def test_a_key_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAR_KEY", raising=False)
    with pytest.raises(MissingError, match="FAR_KEY, which is not set"):
        endpoint("http://127.0.0.1:1", api_key_env="FAR_KEY")


def test_the_budget_is_a_share_of_the_newest_images() -> None:
    budget = FailureBudget("far", ServiceConfig(max_failed_fraction=0.1))
    budget.add(19, 19, "server is down")  # too few to be a share of anything
    with pytest.raises(ScorerStoppedError, match="19 of the last 20 images.*server is down"):
        budget.add(1, 0, "a reason that is none")
    budget = FailureBudget("far", ServiceConfig(max_failed_fraction=0.1))
    budget.add(10_000, 0)
    budget.add(25, 25)
    with pytest.raises(ScorerStoppedError, match="26 of the last 256"):
        budget.add(1, 1)
    # What is long past does not count.
    budget = FailureBudget("far", ServiceConfig(max_failed_fraction=0.1))
    for _ in range(4):
        budget.add(256, 25)
    assert (budget.num_asked, budget.num_failed) == (1024, 100)


def test_the_budget_can_be_a_number() -> None:
    budget = FailureBudget("far", ServiceConfig(max_failed_fraction=1.0, max_failed=2))
    budget.add(100, 2)
    with pytest.raises(ScorerStoppedError, match="3 of 101 images.*max_failed = 2"):
        budget.add(1, 1)
    with pytest.raises(ScorerStoppedError):
        budget.check()


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_results_keep_their_order(concurrency: int) -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (7 - number % 8))
        return number**2

    assert map_concurrently(slow, range(17), concurrency) == [number**2 for number in range(17)]


def test_the_first_exception_comes_through() -> None:
    def half(number: int) -> float:
        if number == 3:
            raise KeyError("three")
        return number / 2

    with pytest.raises(KeyError, match="three"):
        map_concurrently(half, range(9), 4)
