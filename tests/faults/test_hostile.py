"""What strangers wrote, spoilt at random by key: each input ends in one of our own errors or in a sound result,
soon, and never in a defect."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import time
import urllib.request
from urllib.error import HTTPError

import pytest
import torch
from PIL import Image

from diffexpo.bounded.texts import UnreadableError, parse_json
from diffexpo.config.load import load_config
from diffexpo.config.recipes import find_recipe
from diffexpo.config.rewards import ServiceConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import DiffexpoError
from diffexpo.rewards.jpeg import JpegCompressibility
from diffexpo.rewards.remote import RemoteReward
from tests.served import Served
from tests.unit.rewards.scripted_server import Reply, ScriptedServer

WORDS = (
    *(
        "null",
        "[]",
        "{}",
        "-1",
        "1e999",
        "9" * 400,
        ".nan",
        "0x_",
        "2024-02-30",
        "true",
        "*a",
        "&a x",
        "!!int z",
    ),
    *(
        "'",
        '"',
        "{",
        "[",
        ":",
        "? ",
        "<<: *a",
        "\t",
        "\0",
        "\ufeff",
        "\u202e",
        "é" * 300,
        "- - - -",
        "|",
        "...",
    ),
)
VALUES = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        10**12,
        1e300,
        float("nan"),
        "",
        "x" * 1000,
        "\ud800",
        [],
        [[]],
        {},
        [None],
        {"a": []},
    ),
)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 8.5e-4,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "thresholding": False,
}
FLOW = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
}


def spoil_text(draw: random.Random, text: str) -> str:
    """One to three of its lines cut, doubled, moved or given another word."""
    lines = text.split("\n")
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        line, cut = lines[at], draw.randint(0, len(lines[at]))
        head = line.partition(":")[0]
        lines[at] = draw.choice(
            (
                line[:cut],
                f"{line}\n{line}",
                f"  {line}",
                f"{head}: {draw.choice(WORDS)}",
                line[:cut] + draw.choice(WORDS),
            )
        )
    return "\n".join(lines)


def spoil_json(draw: random.Random, value: object) -> object:
    """A copy of which one part, at any depth, is another value or gone."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        rest = {name: inner for name, inner in value.items() if name != key}
        return rest if draw.random() < 0.2 else {**rest, key: spoil_json(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], spoil_json(draw, value[at]), *value[at + 1 :]]
    return draw.choice(VALUES)


def test_recipes(tmp_path) -> None:
    text = find_recipe("emoji/expo").read_text(encoding="utf-8")
    draw = random.Random(0)
    for _ in range(150):
        (tmp_path / "mine.yaml").write_text(spoil_text(draw, text), encoding="utf-8")
        began = time.process_time()
        try:
            load_config([tmp_path / "mine.yaml"], (), {})
        except DiffexpoError as error:
            assert len(str(error)) < 20_000
        assert time.process_time() - began < 5


@pytest.mark.parametrize("settings", [SCHEDULER, FLOW], ids=["betas", "flow"])
def test_schedulers(settings: dict[str, object]) -> None:
    draw = random.Random(1)
    for _ in range(300):
        spoilt = spoil_json(draw, settings)
        try:
            path = DiffusionPath.from_scheduler_config(
                spoilt if isinstance(spoilt, dict) else {}, image_tokens=256
            )
        except DiffexpoError:
            continue
        assert torch.isfinite(torch.stack(path.alpha_sigma(torch.linspace(0.01, 1, 50)))).all()


def test_texts_of_json() -> None:
    draw = random.Random(2)
    text = json.dumps([SCHEDULER, FLOW, ["é😀", {"a": [1, 2, {"b": None}]}]])
    for _ in range(500):
        at = draw.randrange(len(text))
        spoilt = (
            text[:at]
            + draw.choice([*WORDS, "[" * 200, "\\ud800", '{"a":' * 100])
            + text[at + draw.randint(0, 9) :]
        )
        try:
            json.dumps(parse_json(spoilt), ensure_ascii=False).encode()
        except UnreadableError as error:
            assert len(str(error)) < 200


def test_answers_of_a_scorer() -> None:
    """A score is the scorer's own number or NaN, whatever else the answer holds."""
    draw = random.Random(3)
    service = ServiceConfig(timeout_s=5.0, retry_s=0.0, max_failed_fraction=1.0)
    facts = {"protocol": 1, "name": "judge", "type": "python", "version": "v1", "scale": "points"}

    def answer(path: str, body: object) -> Reply:
        if path == "/version":
            return Reply(facts)
        scores = {item["id"]: 3.5 for item in body["items"]}
        spoilt = spoil_json(draw, {**facts, "scores": scores, "errors": {}})
        return Reply(json.dumps(spoilt).encode()[: draw.choice([None, None, 20])])

    with ScriptedServer(answer) as server:
        far = RemoteReward("far", server.url, service)
        for _ in range(60):
            try:
                scores = far.score(torch.zeros(2, 3, 8, 8), ["a", "b"])
            except DiffexpoError:
                continue
            numbers = [v for v in VALUES if isinstance(v, int | float) and not isinstance(v, bool)]
            wanted = torch.tensor([*numbers, 3.5], dtype=torch.float32).tolist()
            assert all(math.isnan(score) or score in wanted for score in scores.tolist())


def test_requests_to_a_server() -> None:
    draw = random.Random(4)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    good = {"protocol": 1, "items": [{"id": f"{n}", "prompt": "a", "image": image} for n in range(2)]}
    with Served(JpegCompressibility("size"), "jpeg_compressibility") as server:
        for _ in range(100):
            body = json.dumps(spoil_json(draw, good)).encode()
            if draw.random() < 0.3:
                body = body[: draw.randrange(len(body) + 1)]
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{server.url}/score", body or b"x", headers)
            try:
                with urllib.request.urlopen(request, timeout=10) as response:
                    assert set(json.loads(response.read())["scores"]) <= {"0", "1", "x" * 1000, ""}
            except HTTPError as error:
                with error:
                    told = json.loads(error.read())["error"]
                    assert error.code in (400, 413) and told and "Traceback" not in told
        assert server.pixels._held == server.bytes._held == 0
