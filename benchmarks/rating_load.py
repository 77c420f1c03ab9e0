"""Load and kill -9 of the rating page: simulated raters over HTTP, against `diffexpo label serve`.

    .venv/bin/python benchmarks/rating_load.py --raters 50 --votes 200 --pause 1.0
    .venv/bin/python benchmarks/rating_load.py --kills 20

The raters are loops that answer by chance; no person is meant. Each opens the page, loads both images and sends its
votes with a pause between them. Reported are errors, the time from sending a vote to having the next task (the vote is
on the disk then), and whether the file is consistent. With --kills the server is killed with signal 9 at random moments
while three raters vote without a pause; every vote that was confirmed must be in the file, once. Results go to
benchmarks/results/rating_load.json.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
from PIL import Image

from diffexpo.config.people import CareConfig, RatingConfig
from diffexpo.labelling.book import Book
from diffexpo.labelling.links import make_links
from diffexpo.labelling.making import Couple, add_couples, open_book

RESULTS = Path(__file__).parent / "results" / "rating_load.json"
TASK = re.compile(r'name="task" value="(\d+)"')


def make_study(folder: Path, pairs: int, raters: int, wanted: int) -> list[str]:
    """A study of random images of 64 pixels; returns the raters' tokens."""
    generator = np.random.default_rng(0)

    def png() -> bytes:
        out = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, "PNG")
        return out.getvalue()

    rating = RatingConfig(exclude=CareConfig(checks_below=0.0, seconds_below=0.0))
    with open_book(folder, "load", rating, {}) as book:
        couples = [Couple(f"p{n}", f"prompt {n}", "a", "b", png(), png()) for n in range(pairs)]
        add_couples(book, 1, couples, ["quality"], wanted)
        links = make_links(book, [f"rater {number}" for number in range(raters)])
        for rater in book.raters():
            book.consent(rater.rater)
    return [link.token for link in links]


def serve(folder: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server on a free port, and its address."""
    with log.open("wb") as out:
        arguments = [sys.executable, "-m", "diffexpo", "label", "serve", str(folder), "--port", "0"]
        running = subprocess.Popen(arguments, stdout=out, stderr=out)
    while True:
        found = re.search(r"rating page at (http\S+)", log.read_text())
        if found:
            return running, found[1]
        if running.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.05)


class Rater:
    """One simulated rater on one connection."""

    def __init__(self, address: str, token: str, seed: int) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        self.path, self.random = f"/r/{token}", random.Random(seed)
        self.times: list[float] = []
        self.errors: list[str] = []
        self.confirmed: dict[int, str] = {}
        self.tried: dict[int, str] = {}

    def ask(self, path: str, data: dict[str, object] | None = None) -> bytes:
        headers = {"content-type": "application/x-www-form-urlencoded", "hx-request": "true"} if data else {}
        self.connection.request("POST" if data else "GET", path, urlencode(data) if data else None, headers)
        answer = self.connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            self.errors.append(f"{answer.status} {path}")
        return body

    def work(self, votes: int, pause: float) -> None:
        """Answer so many tasks, or until none is left."""
        page = self.ask(self.path).decode()
        for _ in range(votes):
            found = TASK.search(page)
            if found is None:
                return
            for image in re.findall(r'src="(/r/[^"]+/image/\w+)"', page)[2:]:
                self.ask(image)
            time.sleep(self.random.uniform(0.5, 1.5) * pause)
            task, answer = int(found[1]), self.random.choice(["left", "right", "tie"])
            began = time.perf_counter()
            self.tried[task] = answer
            page = self.ask(f"{self.path}/vote", {"task": task, "answer": answer}).decode()
            self.times.append(time.perf_counter() - began)
            self.confirmed[task] = answer


def load(raters: int, votes: int, pause: float) -> dict[str, object]:
    """Many raters at once."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_study(Path(folder), votes, raters, raters)
        running, address = serve(Path(folder), Path(folder) / "log.txt")
        people = [Rater(address, token, seed) for seed, token in enumerate(tokens)]
        began = time.monotonic()
        threads = [threading.Thread(target=one.work, args=(votes, pause)) for one in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.monotonic() - began
        running.send_signal(signal.SIGINT)
        code = running.wait()
        with sqlite3.connect(Path(folder) / "labels.sqlite") as file:
            consistent = file.execute("PRAGMA integrity_check").fetchone()[0]
            stored = dict(file.execute("SELECT task, answer FROM votes WHERE undone IS NULL"))
    times = np.array([seconds for one in people for seconds in one.times]) * 1000
    confirmed = {task: answer for one in people for task, answer in one.confirmed.items()}
    return {
        "raters": raters,
        "votes": len(times),
        "pause_s": pause,
        "wall_s": round(wall, 1),
        "errors": [error for one in people for error in one.errors],
        "ms": {
            name: round(float(np.percentile(times, at)), 1)
            for name, at in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100))
        },
        "integrity": consistent,
        "confirmed_and_stored_are_equal": confirmed == stored,
        "exit_code": code,
    }


def kills(count: int) -> dict[str, object]:
    """The server killed at random moments while three raters vote."""
    moments = random.Random(1)
    confirmed: dict[int, str] = {}
    tried: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = make_study(Path(folder), 2000, 3, 3)
        for number in range(count):
            running, address = serve(Path(folder), Path(folder) / "log.txt")
            people = [Rater(address, token, 100 * number + seed) for seed, token in enumerate(tokens)]

            def work(one: Rater) -> None:
                try:
                    one.work(25, 0.0)
                except (OSError, http.client.HTTPException):
                    return  # the server is gone

            threads = [threading.Thread(target=work, args=(one,)) for one in people]
            for thread in threads:
                thread.start()
            while not any(one.confirmed for one in people) and any(thread.is_alive() for thread in threads):
                time.sleep(0.005)
            time.sleep(moments.uniform(0.0, 0.5))
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            for thread in threads:
                thread.join()
            for one in people:
                confirmed |= one.confirmed
                tried |= one.tried
        with Book(Path(folder)) as book:
            consistent = book.rows("PRAGMA integrity_check")[0][0]
            stored = book.rows("SELECT task, answer FROM votes WHERE undone IS NULL")
    return {
        "kills": count,
        "confirmed": len(confirmed),
        "stored": len(stored),
        "lost": len(confirmed.items() - dict(stored).items()),
        "twice": len(stored) - len(dict(stored)),
        "stored_without_being_sent": len(dict(stored).items() - tried.items()),
        "integrity": consistent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--votes", type=int, default=200, help="tasks of each rater")
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds that a rater looks at a pair")
    parser.add_argument("--kills", type=int, default=0, help="kill the server so often instead")
    arguments = parser.parse_args()
    found = (
        kills(arguments.kills)
        if arguments.kills
        else load(arguments.raters, arguments.votes, arguments.pause)
    )
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    known["kills" if arguments.kills else "load"] = found
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
