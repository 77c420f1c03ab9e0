"""How much of a slow scorer's time hides behind sampling, and how many images a second our scorers take.

    .venv/bin/python benchmarks/reward_overlap.py

Overlap: the same images of the embedded diffusion model are collected twice, with scoring after and with
scoring behind the sampler, under a scorer that waits 100 ms an image as a server far away would. Only what
sampling covers can be hidden, so the sampler's steps are chosen (by a trial batch) such that drawing a batch
takes 1.4 times as long as scoring it; the last batch has nothing to hide behind. hidden = 1 - (time that the
sampler waited for scores) / (time in the scorer), which other work on the machine does not disturb; the wall
times of both runs, which it does, are given beside it. Both stores must be equal. A second pair of runs has a
scorer twice as slow as sampling, once with one call at a time and once with four threads (`concurrency: 4`).

Throughput: images a second of JPEG size and of the embedded judge, in this process and through a server on
this machine (in a thread of this process, so client and server share its interpreter). Wall time; one thread
of computation. Written to benchmarks/results/reward_overlap.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffexpo.assembly import resolve
from diffexpo.config.rewards import ServiceConfig
from diffexpo.config.schema import ModelConfig, SamplerConfig, TuningConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.data.store import Store
from diffexpo.online.agents import Agent
from diffexpo.online.explore import Request
from diffexpo.online.units import Drawing, collect, latents_of_unit, make_units
from diffexpo.policies.base import load_policy
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.jpeg import JpegIncompressibility
from diffexpo.rewards.python_file import PythonFileReward
from diffexpo.rewards.remote import RemoteReward
from diffexpo.rewards.scoring import score_drawn
from diffexpo.rewards.server import ScoreServer
from diffexpo.training.background import Background
from diffexpo.types import Drawn, Prompt, Reward

BATCH, UNITS, COVER = 4, 10, 1.4
WAIT = Background.wait
SCORER = """\
import time

def wait(images, prompts):
    time.sleep({seconds} * len(prompts))
    return images.mean(dim=(1, 2, 3)).tolist()
"""


class World:
    """The embedded model and its prompts."""

    def __init__(self) -> None:
        model = ModelConfig(device="cpu")
        self.policy = load_policy(model, TuningConfig(), folder_or_id=resolve("emoji:diffusion"), seed=0)
        self.embeddings = PromptEmbeddings(self.policy, [""])
        self.requests = [Request(Prompt(f"p{i}", f"noto cat {i}"), None) for i in range(BATCH * UNITS)]
        self.embeddings.add([request.prompt.text for request in self.requests])
        agent = Agent("main", "current", 1, False, self.policy.weights.fingerprint("current"))
        self.units = make_units([agent], self.requests, BATCH)

    def drawing(self, scorer: Reward, steps: int) -> Drawing:
        return Drawing(
            self.policy,
            self.embeddings,
            lambda drawn, prompts: score_drawn([scorer], drawn, prompts),
            SamplerConfig(name="ddim", steps=steps, eta=1.0, guidance=4.0),
            False,
            0,
            1,
            "emoji:diffusion",
        )

    def seconds_to_draw(self, scorer: Reward, steps: int) -> float:
        """One batch, drawn and decoded; the faster of two."""
        drawing, times = self.drawing(scorer, steps), []
        for _ in range(2):
            began = time.monotonic()
            self.policy.decode_latents(latents_of_unit(drawing, self.units[0], lambda: None))
            times.append(time.monotonic() - began)
        return min(times)

    def collect(self, scorer: Reward, steps: int, folder: Path, *, overlap: bool) -> dict[str, object]:
        """Wall time of one collection, the time inside the scorer, and what was stored."""
        spent: list[float] = []
        waited: list[float] = []
        drawing = self.drawing(scorer, steps)

        def timed(drawn: Drawn, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
            began = time.monotonic()
            scores = score_drawn([scorer], drawn, prompts)
            spent.append(time.monotonic() - began)
            return scores

        drawing = replace(drawing, score=timed)

        def timed_wait(scoring: Background[Mapping[str, np.ndarray]]) -> None:
            began = time.monotonic()
            WAIT(scoring)
            waited.append(time.monotonic() - began)

        store = Store(folder)
        Background.wait = timed_wait  # type: ignore[method-assign]
        began = time.monotonic()
        collect(drawing, self.units, store, rank=0, size=1, tick=lambda: None, overlap=overlap)
        seconds = time.monotonic() - began
        store.write_manifest("collect", 1, {})
        rows = store.samples(1)
        return {
            "seconds": seconds,
            "scorer": sum(spent),
            "waited": sum(waited),
            "store": (rows, store.latents([row.sample_id for row in rows])),
        }


def compare(world: World, scorer: Reward, steps: int, root: Path) -> dict[str, float]:
    """Serial against overlapped, on the same images."""
    serial = world.collect(scorer, steps, root / "serial", overlap=False)
    behind = world.collect(scorer, steps, root / "behind", overlap=True)
    assert serial["store"][0] == behind["store"][0], "rows differ"
    assert np.array_equal(serial["store"][1], behind["store"][1]), "latents differ"
    return {
        "serial_s": serial["seconds"],
        "overlapped_s": behind["seconds"],
        "scorer_s": serial["scorer"],
        "waited_s": behind["waited"],
        "hidden": 1 - behind["waited"] / behind["scorer"],
        "hidden_by_wall_time": (serial["seconds"] - behind["seconds"]) / serial["scorer"],
    }


def overlap(root: Path, seconds: float) -> dict[str, object]:
    """Hidden share of a scorer that sampling covers, and of one twice as slow as sampling."""
    file = root / "slow.py"
    file.write_text(SCORER.format(seconds=seconds))
    scorer = PythonFileReward("slow", f"{file}:wait")
    world = World()
    per_step = world.seconds_to_draw(scorer, 8) / 8
    steps = max(2, round(COVER * seconds * BATCH / per_step))
    few = max(2, round(steps / COVER / 2))
    threads = PythonFileReward("slow", f"{file}:wait", concurrency=4)
    return {
        "covered": compare(world, scorer, steps, root / "covered") | {"steps": steps},
        "twice_as_slow": compare(world, scorer, few, root / "slow") | {"steps": few},
        "twice_as_slow_4_threads": compare(world, threads, few, root / "threads") | {"steps": few},
        "ms_an_image": 1000 * seconds,
        "images": BATCH * UNITS,
        "batch": BATCH,
    }


def rate(score: Callable[[], object], images: int, seconds: float = 2.0) -> float:
    """Images a second, over some seconds after a first call."""
    score()
    began, calls = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        score()
        calls += 1
    return calls * images / (time.monotonic() - began)


def throughput() -> dict[str, float]:
    """Images a second of 64 pictures of 64 x 64."""
    images = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = [f"noto cat {index}" for index in range(64)]
    found = {}
    for name, kind, scorer in (
        ("jpeg", "jpeg_incompressibility", JpegIncompressibility("jpeg")),
        ("emoji_judge", "clip", ClipReward("judge", resolve("emoji:judge_train"))),
    ):
        found[name] = rate(lambda scorer=scorer: score_drawn([scorer], Drawn(images=images), prompts), 64)
        server = ScoreServer(scorer, kind)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        far = RemoteReward(scorer.name, server.url, ServiceConfig(), concurrency=4)
        found[f"{name}_over_http"] = rate(
            lambda far=far: score_drawn([far], Drawn(images=images), prompts), 64
        )
        server.shutdown()
        server.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="What the slow scorer waits for an image.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reward_overlap.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        result = {
            "overlap": overlap(Path(temporary), options.seconds),
            "images_per_second": throughput(),
            "load_at_the_end": os.getloadavg()[0],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("covered", "twice_as_slow", "twice_as_slow_4_threads"):
        row = result["overlap"][name]
        print(
            f"{name}: {100 * row['hidden']:.0f}% of {row['scorer_s']:.1f} s in the scorer hidden "
            f"({row['serial_s']:.1f} s -> {row['overlapped_s']:.1f} s, {row['steps']} sampler steps)"
        )
    for name, images in result["images_per_second"].items():
        print(f"{name}: {images:.0f} images/s")


if __name__ == "__main__":
    main()
