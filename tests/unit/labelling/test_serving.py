"""The served page: bound to this machine unless told, and killed with signal 9 it has every vote that it confirmed, once."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlencode

import pytest

from diffexpo.config.people import CareConfig, RatingConfig
from diffexpo.errors import ConfigError, MissingError
from diffexpo.labelling.book import Book
from diffexpo.labelling.links import make_links
from diffexpo.labelling.serving import Site, address_of, bind
from tests.commands import Command, diffexpo, start
from tests.raters import answer_all, careful, join, make_book, task_number


@contextmanager
def served(*arguments: str | Path) -> Iterator[tuple[Command, str, str]]:
    """A running `label serve` on a free port: the command, its address, and the owner's page."""
    running = start("label", "serve", *arguments, "--port", "0")
    began, said = time.monotonic(), ""
    while "owner's page" not in said:
        assert running.poll() is None and time.monotonic() - began < 120, running.err.read_text()
        time.sleep(0.02)
        said = running.out.read_text() if running.out.exists() else ""
    address = re.search(r"rating page at (\S+)", said)[1]  # type: ignore[index]
    try:
        yield running, address, said.partition("alone: ")[2].split()[0]
    finally:
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
        running.wait()


def get(address: str, data: dict[str, object] | None = None) -> str:
    body = None if data is None else urlencode(data).encode()
    request = urllib.request.Request(address, body, {"hx-request": "true"} if data else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def test_it_listens_on_this_machine_unless_told(tmp_path: Path) -> None:
    assert Site().host == "127.0.0.1" and Site().is_local and not Site().warnings
    for host, is_local in (("::1", True), ("localhost", True), ("0.0.0.0", False), ("192.168.1.2", False)):
        site = Site(host=host)
        assert site.is_local == is_local and bool(site.warnings) != is_local
        assert is_local or "without TLS" in site.warnings[0]
    assert not Site(host="0.0.0.0", certificate=tmp_path, key=tmp_path).warnings


def test_an_address_that_cannot_be_had_is_explained(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another port"):
            bind(Site(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match="choose another port"):
        bind(Site(host="no.such.host.invalid"))
    with pytest.raises(ConfigError, match="go together"):
        bind(Site(certificate=tmp_path))
    with pytest.raises(MissingError, match="PEM file"):
        bind(Site(certificate=tmp_path / "a", key=tmp_path / "b"))
    with bind(Site(port=0)) as listening:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address_of(Site(), listening))


def test_a_way_over_the_network_and_a_stop(tmp_path: Path) -> None:
    make_book(tmp_path, pairs=2, wanted=1).close()
    made = diffexpo("label", "links", tmp_path, "--name", "ann", "--site", "https://rate.example")
    token = re.search(r"ann: https://rate.example/r/(\S+)", made.out)[1]  # type: ignore[index]
    with served(tmp_path) as (running, address, owner):
        assert address.startswith("http://127.0.0.1:")
        page = get(f"{address}/r/{token}/consent", {"agree": 1})
        assert task_number(page) is not None
        for _ in range(2):
            page = get(f"{address}/r/{token}/vote", {"task": task_number(page), "answer": "left"})
        assert "Thank you" in page and "2 votes count, 0 are still wanted" in get(owner)
        os.kill(running.pid, signal.SIGINT)
        done = running.wait()
    assert done.code == 0 and "stopped" in done.out and "Traceback" not in done.err + done.out
    assert "a study: 2 questions, 2 votes, 0 missing" in diffexpo("label", "status", tmp_path).out


def test_fewer_raters_than_votes_is_said(tmp_path: Path) -> None:
    make_book(tmp_path, wanted=3).close()
    with served(tmp_path) as (running, _, _):
        said = running.out.read_text()
    assert "0 raters have links, but each pair is to get the votes of 3 people" in said


def test_changed_images_are_refused_before_anything_is_served(tmp_path: Path) -> None:
    with make_book(tmp_path) as book:
        book.image_path(book.items()[0].image_b).write_bytes(b"another model's image")
    done = diffexpo("label", "serve", tmp_path, "--port", "0", check=False)
    assert done.code == 4 and "has changed: votes on it would be votes on another image" in done.message


def test_killed_at_random_moments_it_has_every_confirmed_vote_once(tmp_path: Path) -> None:
    """The kills fall anywhere, also between writing a vote and confirming it: such a vote may be there, but once."""
    moments = random.Random(5)
    quiet = RatingConfig(checks_every=0, repeats_every=0, exclude=CareConfig(seconds_below=0))
    with make_book(tmp_path, pairs=400, wanted=6, rating=quiet) as book:
        tokens = [link.token for link in make_links(book, [f"r{number}" for number in range(6)])]
        for rater in book.raters():
            book.consent(rater.rater)
    confirmed: dict[int, str] = {}
    tried: dict[int, str] = {}
    for _ in range(4):
        with served(tmp_path) as (running, address, _):
            end = 0.0  # set once the server answers
            try:
                for step in range(10_000):
                    here = f"{address}/r/{tokens[step % len(tokens)]}"
                    number, answer = task_number(get(here)), moments.choice(["left", "right", "tie"])
                    assert number is not None
                    end = end or time.monotonic() + moments.uniform(0.05, 0.6)
                    if time.monotonic() > end:
                        end = float("inf")
                        # The vote and the kill are under way at the same time.
                        pid = os.fork()
                        if pid == 0:
                            time.sleep(moments.uniform(0.0, 0.01))
                            os.kill(running.pid, signal.SIGKILL)
                            os._exit(0)
                    tried[number] = answer
                    get(f"{here}/vote", {"task": number, "answer": answer})
                    confirmed[number] = answer
            except (OSError, HTTPException) as error:  # an answer may break off in the middle
                assert end == float("inf"), f"{error!r} before the server was killed"
            os.waitpid(pid, 0)
    with Book(tmp_path) as book:
        assert book.rows("PRAGMA integrity_check") == [("ok",)]
        stored = book.rows("SELECT task, answer FROM votes WHERE undone IS NULL")
    assert len(stored) == len(dict(stored)) and len(confirmed) > 4
    assert confirmed.items() <= dict(stored).items() <= tried.items()


def test_when_every_vote_is_in_the_server_can_end_by_itself(tmp_path: Path) -> None:
    from diffexpo.labelling.serving import serve

    with make_book(tmp_path, pairs=2, wanted=1) as book, bind(Site(port=0)) as listening:
        answer_all(book, join(book, "ann")[0], careful("one"))
        serve(book, Site(), listening, "owner", lambda: len(book.votes()) == 2)
