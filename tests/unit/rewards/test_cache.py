"""Scores that are kept: asked once, bit for bit those of the scorer, and never those of another one."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.assembly.aliases import resolve
from diffexpo.config.load import load_config
from diffexpo.config.rewards import ServiceConfig, read_card
from diffexpo.errors import ConfigError, StoreError
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.cache import FILE, CachedReward, ScoreCache, question_key
from diffexpo.rewards.images import to_bytes
from diffexpo.rewards.remote import RemoteReward
from tests.scores import score_images
from tests.served import Served
from tests.unit.rewards.scripted_server import Reply, ScriptedServer

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "bad", "a", "c", "é\u200d"]
IDENTITY = {"type": "python", "version": "1", "scale": "points"}


class Counting:
    """A number of each image and prompt, none for the prompt "bad"; counts what it is asked for."""

    name, scale = "judge", "points"

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.asked: list[str] = []

    @property
    def identity(self) -> dict[str, str]:
        return {"type": "python", "version": self.version, "scale": self.scale}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.asked += prompts
        scores = images.double().mean(dim=(1, 2, 3)) / 3 + torch.tensor([len(text) for text in prompts])
        return torch.where(torch.tensor([text == "bad" for text in prompts]), torch.nan, scores).float()


def scored(folder: Path, images: Tensor = IMAGES, prompts: Sequence[str] = PROMPTS, version: str = "1"):
    """(scores, what was asked, hits) of a scorer with a cache."""
    judge = Counting(version)
    cached = CachedReward(judge, folder, judge.identity)
    return score_images([cached], images, prompts)["judge"], judge.asked, cached.num_hits


def sql(folder: Path, query: str, *values: object) -> list[tuple[object, ...]]:
    """What a statement on the file of a cache gives."""
    with closing(sqlite3.connect(folder / FILE)) as file, file:
        return file.execute(query, values).fetchall()


def count(folder: Path) -> int:
    return sql(folder, "SELECT count(*) FROM scores")[0][0]


def test_the_second_time_nothing_is_asked_and_the_bits_are_the_same(tmp_path: Path) -> None:
    plain = score_images([Counting()], IMAGES, PROMPTS)["judge"]
    first, asked, hits = scored(tmp_path)
    assert asked == PROMPTS and hits == 0
    second, asked, hits = scored(tmp_path)
    # A failure is asked again: it was never kept.
    assert asked == ["bad"] and hits == 5
    for found in (first, second):
        np.testing.assert_array_equal(found.view(np.uint32), plain.view(np.uint32))
    assert [json.loads(facts) for (facts,) in sql(tmp_path, "SELECT facts FROM scorers")] == [IDENTITY]
    assert count(tmp_path) == 5 and [file.name for file in tmp_path.iterdir()] == [FILE]


def test_another_image_prompt_or_version_misses(tmp_path: Path) -> None:
    scored(tmp_path)
    touched = IMAGES.clone()
    touched[0, 0, 0, 0] = 1 - touched[0, 0, 0, 0]
    assert scored(tmp_path, images=touched)[1] == ["a", "bad"]
    assert scored(tmp_path, prompts=["A", *PROMPTS[1:]])[1] == ["A", "bad"]
    assert scored(tmp_path, images=IMAGES.transpose(2, 3))[2] == 0
    assert scored(tmp_path, version="2")[1] == PROMPTS
    assert sql(tmp_path, "SELECT count(*) FROM scorers") == [(2,)]


def test_the_shape_is_part_of_an_image() -> None:
    flat = np.zeros((4, 9, 3), np.uint8)
    assert len({question_key(flat.reshape(*shape), "x") for shape in ((4, 9, 3), (9, 4, 3), (6, 6, 3))}) == 3
    assert question_key(flat, "x") == question_key(flat.copy(), "x") != question_key(flat, "")


def test_the_same_question_in_one_batch_is_asked_once(tmp_path: Path) -> None:
    images, prompts = IMAGES[[0, 1, 0, 0, 1]], ["a", "b", "a", "b", "b"]
    found, asked, _ = scored(tmp_path, images, prompts)
    assert asked == ["a", "b", "b"]
    np.testing.assert_array_equal(found, score_images([Counting()], images, prompts)["judge"])


@pytest.mark.parametrize(
    "score",
    [math.nan, math.inf, "twenty", None, True, 3, b"1.0", 0.25],
    ids=["nan", "inf", "text", "null", "bool", "int", "bytes", "another number"],
)
def test_a_poisoned_value_is_refused_and_asked_again(
    tmp_path: Path, score: object, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _, _ = scored(tmp_path)
    question = question_key(to_bytes(IMAGES)[0], PROMPTS[0])
    sql(tmp_path, "UPDATE scores SET score = ? WHERE question = ?", score, question)
    cache = ScoreCache(tmp_path, "judge", IDENTITY)
    assert cache.find([question]) == {} and cache.num_refused == 1
    assert "1 scores of" in caplog.text and count(tmp_path) == 4
    found, asked, _ = scored(tmp_path)
    assert asked == ["a", "bad"]
    np.testing.assert_array_equal(found, plain)
    assert scored(tmp_path)[1] == ["bad"], "what was asked again counts"


def test_scores_of_another_scorer_are_refused_whatever_they_are_called(tmp_path: Path) -> None:
    scored(tmp_path, version="1")
    other = IDENTITY | {"version": "2"}
    cache = ScoreCache(tmp_path, "judge", other)
    sql(
        tmp_path,
        "UPDATE scores SET identity = (SELECT identity FROM scorers WHERE facts = ?)",
        json.dumps(other, sort_keys=True),
    )
    questions = [str(question) for (question,) in sql(tmp_path, "SELECT question FROM scores")]
    assert cache.find(questions) == {} and cache.num_refused == len(questions) == 5


@pytest.mark.parametrize("damage", ["garbage", "cut", "torn page"])
def test_a_damaged_file_is_explained_and_nothing_of_it_is_used(tmp_path: Path, damage: str) -> None:
    cache = ScoreCache(tmp_path, "judge", IDENTITY)
    cache.add({f"{row}": row / 7 for row in range(2000)})
    file = tmp_path / FILE
    whole = file.read_bytes()
    file.write_bytes(
        {
            "garbage": b"\x80\x04cposix\nsystem\n" * 300,
            "cut": whole[: len(whole) // 2],
            "torn page": whole[:4096] + b"\xff" * 4096 * 3 + whole[4096 * 4 :],
        }[damage]
    )
    with pytest.raises(StoreError, match=r"score cache .* is damaged .*delete it and resume"):
        ScoreCache(tmp_path, "judge", IDENTITY).find([f"{row}" for row in range(2000)])
    file.unlink()
    assert scored(tmp_path)[1] == PROMPTS


def forked_writer(folder: Path, number: int, turns: int) -> int:
    """Process id of a child that writes `turns` times twenty scores."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # the child uses none of the threads of this process
        child = os.fork()
    if child == 0:
        try:
            cache = ScoreCache(folder, "judge", IDENTITY)
            for turn in range(turns):
                cache.add({f"{number}-{turn}-{row}": number + turn / 1000 for row in range(20)})
                time.sleep(0.002)
        finally:
            os._exit(0)
    return child


def test_three_processes_write_at_once_and_a_killed_one_costs_no_other(tmp_path: Path) -> None:
    writers = [forked_writer(tmp_path, number, turns) for number, turns in enumerate((15, 15, 10**6))]
    for writer in writers[:2]:
        os.waitpid(writer, 0)
    cache, deadline = ScoreCache(tmp_path, "judge", IDENTITY), time.monotonic() + 60
    # On a busy machine the third may come to its first turn after the others have come to their last.
    while not cache.find(["2-0-0"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writers[2], signal.SIGKILL)
    os.waitpid(writers[2], 0)
    keys = [f"{number}-{turn}-{row}" for number in (0, 1) for turn in range(15) for row in range(20)]
    assert cache.find(keys) == {key: int(key[0]) + int(key.split("-")[1]) / 1000 for key in keys}
    assert cache.find(["2-0-0"]) == {"2-0-0": 2.0} and cache.num_refused == 0
    # Transactions are whole: a killed one leaves nothing or all of its twenty scores.
    killed = sql(tmp_path, "SELECT count(*) FROM scores WHERE question LIKE '2-%'")[0][0]
    assert killed > 0 and killed % 20 == 0


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, "judge", IDENTITY)
    threads = [
        threading.Thread(target=lambda row=row: cache.add({f"{row}": float(row)})) for row in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.find([f"{row}" for row in range(16)]) == {f"{row}": float(row) for row in range(16)}


def test_what_another_process_adds_is_found_without_a_new_start(tmp_path: Path) -> None:
    mine, other = (ScoreCache(tmp_path, "judge", IDENTITY) for _ in range(2))
    assert mine.find(["x"]) == {}
    other.add({"x": 1.5})
    mine.add({"x": 2.5, "y": 3.5})
    assert mine.find(["x", "y"]) == other.find(["x", "y"]) == {"x": 1.5, "y": 3.5}, "the first counts"


def test_a_served_scorer_is_not_asked_twice(tmp_path: Path) -> None:
    service = ServiceConfig(timeout_s=5.0, retry_s=0.0)
    judge = Counting()
    with Served(judge, "python") as server:
        config = read_card(name="far", type="remote", path=server.url, service=service, cache=str(tmp_path))
        (far,) = load_rewards([config], str, "cpu")
        first = score_images([far], IMAGES, PROMPTS)["far"]
        num_asked = len(judge.asked)
        (again,) = load_rewards([config], str, "cpu")
        good = [row for row, text in enumerate(PROMPTS) if text != "bad"]
        second = score_images([again], IMAGES[good], [PROMPTS[row] for row in good])["far"]
        assert len(judge.asked) == num_asked == 6 and isinstance(again, CachedReward)
        assert (again.num_hits, again.num_misses) == (5, 0)
        plain = score_images([RemoteReward("far", server.url, service)], IMAGES, PROMPTS)["far"]
    np.testing.assert_array_equal(first, plain)
    np.testing.assert_array_equal(second, plain[good])
    with Served(Counting("2"), "python") as server:
        config = config.model_copy(update={"path": server.url})
        (newer,) = load_rewards([config], str, "cpu")
        score_images([newer], IMAGES, PROMPTS)
        assert newer.num_hits == 0


def test_a_vision_language_judge_is_asked_once_for_each_question(tmp_path: Path) -> None:
    def answer(path: str, body: Any) -> Reply:
        if path == "/models":
            return Reply({"data": [{"id": "eye"}]})
        return Reply(
            {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": -0.5}]}]}}]}
        )

    with ScriptedServer(answer) as server:

        def asked(**vlm: object) -> int:
            values = {"name": "eye", "type": "vlm", "path": server.url, "vlm": vlm, "cache": str(tmp_path)}
            (judge,) = load_rewards([read_card(**values)], str, "cpu")
            before = len(server.seen)
            assert judge.score(IMAGES, PROMPTS).tolist() == [1.0] * 6
            return len(server.seen) - before

        assert [asked(), asked(), asked(question="{prompt}?"), asked(top_logprobs=5), asked()] == [
            6,
            0,
            6,
            6,
            0,
        ]


def test_two_functions_of_one_file_keep_their_scores_apart(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def one(images, prompts):\n    return [1.0] * len(prompts)\n\n\ndef two(images, prompts):\n    return [2.0] * len(prompts)\n"
    )
    for _ in range(2):
        for name, expected in (("one", 1.0), ("two", 2.0)):
            config = read_card(
                name="mine", type="python", path=f"{file}:{name}", cache=str(tmp_path / "kept")
            )
            (judge,) = load_rewards([config], str, "cpu")
            assert judge.score(IMAGES, PROMPTS).tolist() == [expected] * 6


def network(folder: Path) -> CachedReward:
    config = read_card(name="judge", type="clip", path="emoji:judge_train", cache=str(folder))
    (judge,) = load_rewards([config], resolve, "cpu")
    assert isinstance(judge, CachedReward)
    return judge


def test_a_network_knows_a_batch_as_a_whole_and_gives_its_bits(tmp_path: Path) -> None:
    images, prompts = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)), ["a red cat"] * 6
    first = network(tmp_path)
    plain = first.reward.score(images, prompts)
    half = first.reward.score(images[:3], prompts[:3])
    assert torch.equal(first.score(images, prompts), plain) and first.num_misses == 6
    again = network(tmp_path)
    again.reward.score = lambda *_: pytest.fail("asked again")
    assert torch.equal(again.score(images, prompts), plain) and (again.num_hits, again.num_misses) == (6, 0)
    # the same images in other company are another question
    other = network(tmp_path)
    assert torch.equal(other.score(images[:3], prompts[:3]), half) and other.num_hits == 0
    assert torch.equal(other.score(images.flip(0), prompts), other.reward.score(images.flip(0), prompts))
    assert (other.num_hits, other.num_misses) == (0, 9)


def test_a_batch_that_was_kept_in_part_is_scored_as_a_whole(tmp_path: Path) -> None:
    images, prompts = IMAGES[:4].repeat(1, 1, 8, 8), ["a", "b", "c", "d"]
    first = network(tmp_path)
    plain = first.score(images, prompts)
    sql(tmp_path, "DELETE FROM scores WHERE question = (SELECT max(question) FROM scores)")
    again = network(tmp_path)
    assert torch.equal(again.score(images, prompts), plain) and (again.num_hits, again.num_misses) == (0, 4)
    assert network(tmp_path).cache.find([]) == {} and count(tmp_path) == 4


def test_the_device_and_its_threads_are_part_of_a_networks_identity(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    network(tmp_path).score(IMAGES[:2].repeat(1, 1, 8, 8), ["a", "b"])
    ((facts,),) = sql(tmp_path, "SELECT facts FROM scorers")
    record = json.loads(str(facts))
    assert (
        record["device"] == "cpu"
        and record["threads"] == str(threads)
        and record["torch"] == torch.__version__
    )
    assert set(record) == {"type", "version", "scale", "device", "threads", "torch"}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{name: x, type: denoising, cache: kept}", "no score stays true"),
        ("{name: x, type: jpeg_compressibility, cache: kept}", "costs less than looking a score up"),
        (
            "{name: x, type: vlm, path: 'http://h/v1', vlm: {mode: pairwise}, cache: kept}",
            "share of wins depends",
        ),
        ("{name: x, type: python, path: 'a.py:f', cahce: kept}", "cache"),
    ],
)
def test_scores_that_may_not_be_kept_are_refused_before_the_run(reward: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], [f"rewards=[{reward}]"], {})


def test_a_folder_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="score cache .* cannot be used"):
        CachedReward(Counting(), tmp_path / "file", IDENTITY)
    assert to_bytes(IMAGES).dtype == np.uint8
