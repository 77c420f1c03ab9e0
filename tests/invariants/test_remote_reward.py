"""A scorer behind a server that drops, delays, mangles, reorders and restarts: the store and its pairs are those of a clean run.

Images whose score stays away are left out and counted. The served command is the real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.config.rewards import ServiceConfig
from diffexpo.data.store import Store
from diffexpo.errors import ScorerStoppedError
from diffexpo.online.credit import stack_rewards
from diffexpo.online.pairing import make_pairs
from diffexpo.online.stages.collect import collection_metrics
from diffexpo.online.units import collect, group_rows
from diffexpo.rewards.jpeg import JpegIncompressibility
from diffexpo.rewards.remote import RemoteReward
from diffexpo.rewards.server import ScoreHandler
from tests.commands import start
from tests.scores import score_images
from tests.served import Served
from tests.unit.online.test_collect import REQUESTS, make_drawing, units_of

SERVICE = ServiceConfig(timeout_s=1.0, retry_s=60.0, images_per_request=2)
FAULTS = ("drop", "late", "garbage", "error", "cut", "shuffled", "partial", "foreign", "words", "busy")


class Exact:
    """A scorer whose numbers do not depend on the batch, bit for bit; without one for birds, if they are not liked."""

    name, version, scale = "judge", "v1", "points"

    def __init__(self, likes_birds: bool = True) -> None:
        self.likes_birds = likes_birds

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        sums = (images * 255).round().long().sum(dim=(1, 2, 3)).float()
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        is_refused = torch.tensor([not self.likes_birds and "bird" in prompt for prompt in prompts])
        return torch.where(is_refused, torch.nan, sums + lengths)


class Trouble(ScoreHandler):
    """Every new request meets one fault, the faults in turn; when it comes again it is answered properly."""

    known: set[str]
    met: Counter[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(body).hexdigest()
        fault = "none" if digest in self.known else FAULTS[len(self.known) % len(FAULTS)]
        self.known.add(digest)
        self.met[fault] += 1
        self.close_connection = True
        answer = self.score(json.loads(body))
        items = list(answer["scores"].items())
        if fault == "shuffled":
            random.Random(digest).shuffle(items)
        if fault == "partial":
            items = items[1:]
        if fault == "foreign":
            items = [(f"{index}-{'0' * 16}", score) for index, (_, score) in enumerate(items)]
        if fault == "words":
            items = [(key, "very good") for key, _ in items]
        if fault == "late":
            time.sleep(1.5)
        if fault == "drop":
            return
        payload = json.dumps({**answer, "scores": dict(items)}).encode()
        if fault == "garbage":
            payload = b"<html>welcome to the captive portal"
        self.send_response({"error": 500, "busy": 503}.get(fault, 200))
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload[: len(payload) // 2] if fault == "cut" else payload)


def trouble() -> type[Trouble]:
    """A handler with a memory of its own."""
    return type("FreshTrouble", (Trouble,), {"known": set(), "met": Counter()})


def no_tick() -> None:
    return None


def collected(root: Path, scorer, tick=no_tick) -> tuple[list, np.ndarray, list]:
    """Rows, latents and pairs of one collection under a scorer."""
    drawing = make_drawing(score=lambda drawn, prompts: score_images([scorer], drawn.images, prompts))
    store = Store(root)
    collect(drawing, units_of(drawing), store, rank=0, size=1, tick=tick)
    store.write_manifest("collect", drawing.iteration, {})
    rows = store.samples(drawing.iteration)
    groups = group_rows(rows)
    paired = make_pairs(
        groups, stack_rewards(groups)["judge"], iteration=2, seed=7, judge="judge", min_margin=0.0
    )
    return rows, store.latents([row.sample_id for row in rows]), paired.pairs


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, np.ndarray, list]:
    """What a scorer in the process gives."""
    return collected(tmp_path_factory.mktemp("clean"), Exact())


def assert_same(found: tuple[list, np.ndarray, list], clean: tuple[list, np.ndarray, list]) -> None:
    assert found[0] == clean[0]
    assert np.array_equal(found[1], clean[1])
    assert found[2] == clean[2] and len(clean[2]) == len(REQUESTS)


def test_trouble_on_the_way_changes_nothing(clean: tuple, tmp_path: Path) -> None:
    handler = trouble()
    with Served(Exact(), "python", handler=handler) as server:
        far = RemoteReward("judge", server.url, SERVICE, concurrency=3)
        assert_same(collected(tmp_path, far), clean)
    assert set(FAULTS) <= set(handler.met), handler.met
    assert far.num_retries >= len(FAULTS) - 1 and far.budget.num_failed == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_restarts_changes_nothing(clean: tuple, tmp_path: Path) -> None:
    first = Served(Exact(), "python", port=free_port())
    found: list[Served] = []
    ticks: list[None] = []

    def come_back() -> None:
        time.sleep(0.5)
        found.append(Served(Exact(), "python", port=first.port))
        found[0].start()

    back = threading.Thread(target=come_back)

    def tick() -> None:
        ticks.append(None)
        if len(ticks) == 12:
            first.stop()
            back.start()

    first.start()
    far = RemoteReward("judge", first.url, SERVICE, concurrency=3)
    assert_same(collected(tmp_path, far, tick), clean)
    back.join()
    found[0].stop()
    assert found[0].batcher.num_images > 0 and far.num_retries > 0


def test_an_image_without_a_score_is_left_out_and_counted(clean: tuple, tmp_path: Path) -> None:
    service = SERVICE.model_copy(update={"max_failed_fraction": 0.5})
    with Served(Exact(likes_birds=False), "python") as server:
        far = RemoteReward("judge", server.url, service)
        rows, _, pairs = collected(tmp_path, far)
    birds = [row for row in rows if row.prompt == "a bird"]
    assert len(birds) == 6 and all(np.isnan(row.rewards["judge"]) for row in birds)
    assert far.budget.num_failed == collection_metrics(rows)["rollout/reward/judge/failed"] == 6
    assert pairs == [pair for pair in clean[2] if pair.prompt != "a bird"]


def test_a_server_that_stays_away_stops_the_run_and_a_resume_completes_it(
    clean: tuple, tmp_path: Path
) -> None:
    first, ticks = Served(Exact(), "python", port=free_port()), []

    def tick() -> None:
        ticks.append(None)
        if len(ticks) == 12:
            first.stop()

    service = SERVICE.model_copy(update={"retry_s": 0.0, "max_failed": 0})
    first.start()
    # A request that was under way is told that the server stops, or hears nothing.
    said = "max_failed = 0 allows; the last one: .*(no answer|server is stopping).*resume"
    with pytest.raises(ScorerStoppedError, match=said):
        collected(tmp_path, RemoteReward("judge", first.url, service), tick)
    done = sorted(path.name for path in tmp_path.glob("samples-*"))
    assert 0 < len(done) < 8
    # Nothing that failed was stored: the next start makes the rest and comes to the same store.
    Store(tmp_path).discard_incomplete("collect", 2)
    with Served(Exact(), "python", port=first.port) as second:
        assert_same(collected(tmp_path, RemoteReward("judge", second.url, service)), clean)
        assert second.batcher.num_images == 30 - 4 * len(done)


def test_the_command_serves_a_scorer_until_interrupted(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text("name: size\ntype: jpeg_incompressibility\n")
    command = start("rewards", "serve", "--config", tmp_path / "reward.yaml", "--port", "0")
    lines: list[str] = []
    deadline = time.monotonic() + 60
    while len(lines) < 3:
        assert time.monotonic() < deadline and command.poll() is None, "the server says nothing"
        time.sleep(0.01)
        lines = command.out.read_text().splitlines() if command.out.exists() else []
    url = lines[0].split()[-1]
    assert lines[2] == f"in a recipe: rewards: [{{name: size, type: remote, path: {url}}}]"
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    far = RemoteReward("size", url, ServiceConfig(scorer="size", retry_s=5.0))
    assert torch.equal(far.score(images, ["x"] * 3), JpegIncompressibility("size").score(images, ["x"] * 3))
    os.kill(command.pid, signal.SIGINT)
    done = command.wait()
    assert done.code == 0 and done.out.splitlines()[3:] == ["stopped"]
