"""A served scorer gives what the scorer itself gives; what goes wrong between is NaN and counted, or stops the run."""

from __future__ import annotations

import base64
import json
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import torch

from diffexpo.config.rewards import ServiceConfig, read_card
from diffexpo.errors import ConfigError, MissingError, RewardError, ScorerStoppedError
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.calling import png_base64
from diffexpo.rewards.images import quantise, to_bytes
from diffexpo.rewards.jpeg import JpegCompressibility
from diffexpo.rewards.remote import RemoteReward
from diffexpo.rewards.server import decode_png
from tests.scores import score_images
from tests.served import Served
from tests.unit.rewards.scripted_server import Reply, ScriptedServer

IMAGES = torch.rand(7, 3, 10, 12, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "bad", "ünïcödé 😀", "", "f" * 300, "g"]
QUICK = ServiceConfig(timeout_s=5.0, retry_s=0.0, images_per_request=3)
FACTS = {"protocol": 1, "name": "judge", "type": "python", "version": "v1", "scale": "points"}


class Ledger:
    """An exact scorer that remembers the size of its batches."""

    name, version, scale = "judge", "v1", "points"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate: threading.Event | None = None

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        self.batches.append(len(prompts))
        if self.gate is not None:
            self.gate.wait(10)
        if "crash" in prompts:
            raise ValueError("cannot look at this")
        sums = (images * 255).round().sum(dim=(1, 2, 3))
        scores = sums * 10 + torch.tensor([len(prompt) for prompt in prompts])
        return torch.where(torch.tensor([prompt == "bad" for prompt in prompts]), torch.nan, scores)


def test_a_served_scorer_gives_its_own_scores() -> None:
    ledger = Ledger()
    expected = score_images([ledger], IMAGES, PROMPTS)["judge"]
    with Served(ledger, "python") as server:
        far = RemoteReward("judge", server.url, QUICK)
        assert (far.version, far.scale) == ("python v1", "points")
        found = score_images([far], IMAGES, PROMPTS)["judge"]
        one = far.score(quantise(IMAGES[:1]), PROMPTS[:1])
        none = far.score(IMAGES[:0], [])
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(found[2]) and np.isfinite(np.delete(found, 2)).all()
    assert one.tolist() == [expected[0]] and none.shape == (0,)
    assert (far.budget.num_asked, far.budget.num_failed, far.num_retries) == (8, 1, 0)


def test_a_scorer_that_compares_images_with_each_other_is_not_served() -> None:
    judge = Ledger()
    judge.is_groupwise = True
    with pytest.raises(ConfigError, match="compares the images of a prompt"):
        Served(judge, "vlm")


def test_a_configuration_names_a_served_scorer() -> None:
    with Served(JpegCompressibility("size"), "jpeg_compressibility") as server:
        config = read_card(name="far", type="remote", path=server.url, concurrency=2, service=QUICK)
        (far,) = load_rewards([config], str, "cpu")
        expected = JpegCompressibility("size").score(IMAGES, PROMPTS)
        assert torch.equal(far.score(IMAGES, PROMPTS), expected)
    with pytest.raises(RewardError, match="7 images but 2 prompts"):
        far.score(IMAGES, PROMPTS[:2])


def test_requests_that_come_together_are_scored_together() -> None:
    ledger = Ledger()
    ledger.gate = threading.Event()
    service = QUICK.model_copy(update={"images_per_request": 1})
    with Served(ledger, "python", batch_size=5) as server:
        far = RemoteReward("judge", server.url, service, concurrency=7)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(far.score, IMAGES, ["x"] * 7)
            while server.batcher._tickets.qsize() + sum(ledger.batches) < 7:
                pass
            ledger.gate.set()
            assert torch.isfinite(job.result()).all()
        assert server.batcher.num_images == 7
    # Whoever came first was alone or not; the others waited for the gate and then shared batches.
    assert max(ledger.batches) <= 5 and len(ledger.batches) <= 4


def test_images_of_several_sizes_may_wait_together() -> None:
    ledger = Ledger()
    other = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with Served(ledger, "python", wait_ms=50) as server:
        far = RemoteReward("judge", server.url, QUICK)
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(far.score, images, ["x"] * len(images)) for images in (IMAGES, other)]
            found = [job.result() for job in jobs]
    assert torch.equal(found[0], ledger.score(IMAGES, ["x"] * 7))
    assert torch.equal(found[1], ledger.score(other, ["x"] * 3))


def test_a_scorer_that_breaks_does_not_end_its_server() -> None:
    with Served(Ledger(), "python") as server:
        far = RemoteReward("judge", server.url, QUICK)
        assert torch.isnan(far.score(IMAGES[:2], ["crash", "a"])).all()
        assert torch.isfinite(far.score(IMAGES[:2], ["b", "a"])).all()
    assert far.budget.num_failed == 2


def test_a_dead_server_is_missing_at_the_start_and_stops_the_run_later() -> None:
    with Served(Ledger(), "python") as server:
        far = RemoteReward("judge", server.url, QUICK)
        url = server.url
    with pytest.raises(MissingError, match="start it with `diffexpo rewards serve`"):
        RemoteReward("judge", url, QUICK)
    many = IMAGES[:1].expand(30, -1, -1, -1)
    with pytest.raises(ScorerStoppedError, match="of the last .* images got no score.*resume"):
        score_images([far], many, ["x"] * 30)


def scripted(scores: Any, **changes: Any) -> ScriptedServer:
    """A server whose scores are a function of the items asked for."""

    def answer(path: str, body: Any) -> Reply:
        if path == "/version":
            return Reply(FACTS)
        found = scores(body["items"])
        return found if isinstance(found, Reply) else Reply({**FACTS, "scores": found, **changes})

    return ScriptedServer(answer)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", "1e400", "1" + "0" * 400])
def test_what_is_no_finite_number_is_nan_and_not_asked_again(value: str) -> None:
    def scores(items: list[dict[str, str]]) -> Reply:
        pairs = ",".join(f'"{item["id"]}": {value if item["prompt"] == "bad" else 2.5}' for item in items)
        return Reply((json.dumps(FACTS)[:-1] + ', "scores": {' + pairs + "}}").encode())

    with scripted(scores) as server:
        far = RemoteReward("judge", server.url, QUICK)
        found = far.score(IMAGES, PROMPTS)
        assert [path for path, _, _ in server.seen].count("/score") == 3
    assert torch.isnan(found[2]) and (found[[0, 1, 3, 4, 5, 6]] == 2.5).all()
    assert far.budget.num_failed == 1


@pytest.mark.parametrize(
    "scores",
    [
        lambda items: {},
        lambda items: None,
        lambda items: [1.0] * len(items),
        lambda items: {"0-0000000000000000": 1.0},
        lambda items: {item["id"]: "good" for item in items},
        lambda items: {item["id"]: True for item in items},
        lambda items: {str(index): 1.0 for index, _ in enumerate(items)},
        lambda items: {item["id"]: 1.0 for item in items} | {"another": 1.0},
        lambda items: Reply(b"\xff\xfe garbage"),
        lambda items: Reply({"scores": {item["id"]: 1.0 for item in items}}),
        lambda items: Reply({"protocol": 1, "scores": {item["id"]: 1.0 for item in items}}),
    ],
)
def test_an_answer_to_something_else_is_no_score(scores: Any) -> None:
    with scripted(scores) as server:
        far = RemoteReward("judge", server.url, QUICK)
        assert torch.isnan(far.score(IMAGES, PROMPTS)).all()
    assert far.budget.num_failed == 7


def test_what_an_incomplete_answer_holds_is_kept() -> None:
    service = QUICK.model_copy(update={"retry_s": 20.0, "images_per_request": 7})
    with scripted(lambda items: {item["id"]: float(item["id"][0]) for item in items[:3]}) as server:
        far = RemoteReward("judge", server.url, service)
        assert far.score(IMAGES, PROMPTS).tolist() == [0, 1, 2, 3, 4, 5, 6]
        asked = [len(body["items"]) for path, body, _ in server.seen if path == "/score"]
    assert asked == [7, 4, 1] and far.num_retries == 2


def test_one_refused_image_costs_one_row() -> None:
    def scores(items: list[dict[str, str]]) -> Any:
        if any(item["prompt"] == "bad" for item in items):
            return Reply({"error": "this one is too large"}, 413)
        return {item["id"]: 1.0 for item in items}

    with scripted(scores) as server:
        far = RemoteReward("judge", server.url, QUICK.model_copy(update={"images_per_request": 7}))
        found = far.score(IMAGES, PROMPTS)
    assert torch.isnan(found).tolist() == [prompt == "bad" for prompt in PROMPTS]
    assert (far.budget.num_asked, far.budget.num_failed) == (7, 1)


def test_scores_of_two_scorers_are_never_mixed() -> None:
    for changes in ({"version": "v2"}, {"name": "other"}):
        with scripted(lambda items: {item["id"]: 1.0 for item in items}, **changes) as server:
            far = RemoteReward("judge", server.url, QUICK)
            with pytest.raises(ScorerStoppedError, match="scores of two scorers cannot be mixed"):
                score_images([far], IMAGES, PROMPTS)


def test_the_scorer_asked_for_is_the_scorer_served() -> None:
    with scripted(lambda items: {}) as server:
        for wanted in ({"scorer": "judge", "version": "v1"}, {"scorer": None}):
            RemoteReward("far", server.url, QUICK.model_copy(update=wanted))
        with pytest.raises(ScorerStoppedError, match=r"serves scorer 'judge', but service.scorer = 'jury'"):
            RemoteReward("far", server.url, QUICK.model_copy(update={"scorer": "jury"}))
        with pytest.raises(ScorerStoppedError, match=r"service.version = 'v9'"):
            RemoteReward("far", server.url, QUICK.model_copy(update={"version": "v9"}))


@pytest.mark.parametrize(
    ("facts", "kind", "message"),
    [
        ({**FACTS, "protocol": 2}, ScorerStoppedError, "speaks protocol 2, expected 1"),
        ({"hello": "world"}, MissingError, "no scorer of this protocol"),
        ({**FACTS, "version": None}, MissingError, "gives no version"),
    ],
)
def test_other_servers_are_recognised(facts: object, kind: type[Exception], message: str) -> None:
    with ScriptedServer(lambda path, body: Reply(facts)) as server, pytest.raises(kind, match=message):
        RemoteReward("far", server.url, QUICK)


# The server alone, by requests that our client would not send.


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def item(key: str, image: str) -> dict[str, str]:
    return {"id": key, "prompt": "a", "image": image}


PNG = png_base64(to_bytes(IMAGES)[0])


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "protocol 1"),
        (b'{"protocol": 2, "items": []}', 400, "protocol 1"),
        (json.dumps({"protocol": 1, "items": []}).encode(), 400, "not a list of images"),
        (json.dumps({"protocol": 1, "items": [{"id": 3}]}).encode(), 400, "lacks id, prompt or image"),
        (
            json.dumps({"protocol": 1, "items": [item("x", PNG), item("x", PNG)]}).encode(),
            400,
            "two items have one id",
        ),
        (b"x" * 70_000, 413, "at most 65536"),
    ],
)
def test_bad_requests_are_explained(body: bytes, status: int, message: str) -> None:
    with Served(Ledger(), "python", max_mib=1 / 16) as server:
        found = ask(server.url + "/score", body)
        assert found[0] == status and message in found[1]["error"]


def test_what_the_server_says_of_itself() -> None:
    with Served(Ledger(), "python") as server:
        assert ask(server.url + "/health") == (200, {"status": "ok", "images": 0})
        assert ask(server.url + "/version") == (200, FACTS)
        assert ask(server.url + "/secrets")[0] == 404
        assert ask(server.url + "/other", b"{}")[0] == 404
        assert ask(server.url + "/score", b"{}", **{"Content-Type": "text/plain"})[0] == 415
        assert server.url.startswith("http://127.0.0.1:")


def test_one_unreadable_image_costs_one_row() -> None:
    jpeg = base64.b64encode(b"\xff\xd8\xff\xe0 not a png").decode()
    items = [item("good", PNG), item("jpeg", jpeg), item("text", "?!"), item("cut", PNG[: len(PNG) // 8 * 4])]
    with Served(Ledger(), "python") as server:
        status, reply = ask(server.url + "/score", json.dumps({"protocol": 1, "items": items}).encode())
    assert status == 200
    assert {key for key, score in reply["scores"].items() if score is None} == {"jpeg", "text", "cut"}
    assert set(reply["errors"]) == {"jpeg", "text", "cut"}
    assert reply["scores"]["good"] == float(Ledger().score(quantise(IMAGES[:1]), ["a"]))


def test_images_travel_without_loss() -> None:
    for image in to_bytes(IMAGES):
        np.testing.assert_array_equal(decode_png(png_base64(image)), image)


def test_a_taken_port_is_explained() -> None:
    with (
        Served(Ledger(), "python") as server,
        pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"),
    ):
        Served(Ledger(), "python", port=server.port)
