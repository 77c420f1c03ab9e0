"""Evaluations are comparable between versions, complete on disk, and never turn a failure into a number."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path as FolderPath

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.config.schema import EvaluationConfig, SamplerConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.diffusion import Path
from diffexpo.errors import DataError, Interrupted, MissingError, RewardError, ScorerStoppedError
from diffexpo.evaluation.records import SuiteResult, is_saved, load_suite, save_suite
from diffexpo.evaluation.suites import Embedder, Evaluation, choose_prompts
from diffexpo.policies.toy import ToyPolicy
from diffexpo.training.distributed import World
from diffexpo.types import Prompt

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
PROMPTS = [Prompt(f"id{i}", f"word {i}") for i in range(6)]
SETTINGS = EvaluationConfig(
    num_prompts=6,
    images_per_prompt=2,
    sampler=SamplerConfig(name="ddpm", steps=3, guidance=2.0),
    kl_prompts=4,
    vendi_prompts=2,
    vendi_images=4,
)


class Redness:
    """Mean of the red channel; may fail on some prompts."""

    version, scale = "1", "mean red"

    def __init__(self, name: str = "redness", fails: str = "") -> None:
        self.name, self.fails = name, fails
        self.seen: list[Tensor] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(images)
        if self.fails == "raise":
            raise RewardError("offline")
        values = images[:, 0].mean(dim=(1, 2))
        return torch.where(torch.tensor([text == self.fails for text in prompts]), torch.nan, values)


def make_policy() -> ToyPolicy:
    policy = ToyPolicy(Path.vp(ABAR))
    state = policy.weights.state("current")
    policy.weights.load("moved", {name: value + 0.05 for name, value in state.items()})
    return policy


def flat(images: Tensor) -> Tensor:
    return images.flatten(1) + 0.1


PIXELS = Embedder(flat, "pixels")


def evaluated(
    policy: ToyPolicy,
    version: str,
    prompts: Sequence[Prompt],
    settings: EvaluationConfig,
    judges: Sequence[Redness],
    seed: int,
    tick: Callable[[], None] = lambda: None,
    **more: object,
) -> SuiteResult:
    return Evaluation(policy, prompts, settings, judges, seed, **more).run(version, tick)


def test_same_noise_for_every_version_and_rows_in_order() -> None:
    policy = make_policy()
    base = evaluated(policy, "base", PROMPTS, SETTINGS, [Redness()], 7, embedder=PIXELS)
    again = evaluated(policy, "base", PROMPTS, SETTINGS, [Redness()], 7, embedder=PIXELS)
    moved = evaluated(policy, "moved", PROMPTS, SETTINGS, [Redness()], 7, embedder=PIXELS)
    policy.weights.copy("base", "twin")
    twin = evaluated(policy, "twin", PROMPTS, SETTINGS, [Redness()], 7, embedder=PIXELS)
    assert np.array_equal(base.images, again.images) and np.array_equal(base.images, twin.images)
    assert not np.array_equal(base.images, moved.images)
    assert base.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2, 2, 3, 3, 4, 4, 5, 5]
    assert base.scored.sum() == 12
    assert base.kl == [] and twin.kl == [0.0] * 4 and min(moved.kl) > 0
    assert set(base.vendi) == {"id0", "id1"} and all(1 <= value <= 4 for value in base.vendi.values())
    assert base.network_evaluations == 16 * 6


class Meeting:
    """Where two threads exchange what two processes would."""

    def __init__(self) -> None:
        self.all_here, self.brought = threading.Barrier(2, timeout=60), {}

    def exchange(self, rank: int, items: list) -> list:
        self.brought[rank] = json.loads(json.dumps(items))
        self.all_here.wait()
        found = [item for number in (0, 1) for item in self.brought[number]]
        self.all_here.wait()
        return found


@dataclass(frozen=True)
class OneOfTwo(World):
    """One of two processes, in a thread."""

    meeting: Meeting = field(default_factory=Meeting)

    def barrier(self) -> None:
        self.meeting.exchange(self.rank, [])

    def gather_objects(self, items: list) -> list:
        return self.meeting.exchange(self.rank, items)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_two_processes_share_an_evaluation_and_end_with_that_of_one(
    tmp_path: FolderPath, batch_size: int
) -> None:
    options = {"embedder": PIXELS, "batch_size": batch_size}
    whole = evaluated(make_policy(), "moved", PROMPTS, SETTINGS, [Redness()], 7, **options)
    meeting, judges = Meeting(), [Redness(), Redness()]

    def work(rank: int) -> SuiteResult:
        more = options | {"world": OneOfTwo(rank, 2, meeting=meeting), "folder": tmp_path}
        return evaluated(make_policy(), "moved", PROMPTS, SETTINGS, [judges[rank]], 7, **more)

    with ThreadPoolExecutor(2) as both:
        first, second = both.map(work, (0, 1))
    assert np.array_equal(first.images, whole.images)
    for result in (first, second):
        assert (result.kl, result.vendi) == (whole.kl, whole.vendi)
        assert np.array_equal(result.scores["redness"], whole.scores["redness"])
    seen = [sum(map(len, judge.seen)) for judge in judges]
    assert sum(seen) == len(whole.images) and (seen[1] > 0) == (batch_size < len(whole.images))


def test_an_image_does_not_depend_on_the_other_prompts() -> None:
    policy = make_policy()
    whole = evaluated(policy, "base", PROMPTS, SETTINGS, [Redness()], 7)
    part = evaluated(policy, "base", PROMPTS[3:5], SETTINGS, [Redness()], 7, batch_size=3)
    other = evaluated(policy, "base", PROMPTS[3:5], SETTINGS, [Redness()], 8)
    for image in range(2):
        rows = part.row_of(PROMPTS[3].id, image), whole.row_of(PROMPTS[3].id, image)
        gap = part.images[rows[0]].astype(int) - whole.images[rows[1]].astype(int)
        assert np.abs(gap).max() <= 1
    assert not np.array_equal(part.images, other.images)


def test_embeddings_that_are_kept_are_made_once_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, encoded = make_policy(), []
    encode = policy.encode_prompts
    monkeypatch.setattr(policy, "encode_prompts", lambda texts: encoded.extend(texts) or encode(texts))
    plain = evaluated(policy, "moved", PROMPTS, SETTINGS, [Redness()], 7)
    encoded.clear()
    kept = PromptEmbeddings(policy)
    results = [
        evaluated(policy, version, PROMPTS, SETTINGS, [Redness()], 7, encode=kept.select)
        for version in ("base", "moved")
    ]
    assert sorted(encoded) == sorted({"", *(prompt.text for prompt in PROMPTS)})
    assert np.array_equal(results[1].images, plain.images) and results[1].kl == plain.kl


class InOrder(Redness):
    """A judge whose numbers depend on how often it was called, and that does not bear two calls at once."""

    def __init__(self) -> None:
        super().__init__()
        self.running = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.running += 1
        assert self.running == 1, "two calls at once"
        scores = super().score(images, prompts) + len(self.seen)
        self.running -= 1
        return scores


def test_judging_while_drawing_gives_what_judging_afterwards_gives() -> None:
    serial, overlapped = (
        evaluated(
            make_policy(),
            "moved",
            PROMPTS,
            SETTINGS,
            [InOrder()],
            7,
            embedder=PIXELS,
            batch_size=3,
            overlap=overlap,
        )
        for overlap in (False, True)
    )
    assert serial.scores["redness"].max() > 5, "six batches were counted"
    for name, value in vars(serial).items():
        if name != "seconds":
            np.testing.assert_equal(vars(overlapped)[name], value)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_batch_is_judged_while_the_next_is_drawn(overlap: bool) -> None:
    drawn = [threading.Event() for _ in range(6)]
    met: list[bool] = []
    calls: list[None] = []

    class Waiting(Redness):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            # True if the next batch is being drawn; a judge that is called behind the drawing waits in vain.
            met.append(
                drawn[len(met) + 1].wait(5 if overlap and len(met) < 4 else 0) if len(met) < 5 else False
            )
            return super().score(images, prompts)

    def tick() -> None:
        calls.append(None)
        drawn[min((len(calls) - 1) // 4, 5)].set()  # three denoising steps and the batch

    settings = SETTINGS.model_copy(update={"kl_prompts": 0})
    evaluated(
        make_policy(),
        "base",
        PROMPTS,
        settings,
        [Waiting()],
        7,
        tick,
        embedder=PIXELS,
        batch_size=3,
        overlap=overlap,
    )
    assert len(met) == 6 and met[:4] == [overlap] * 4


def test_what_stops_a_judge_is_raised_and_an_interruption_leaves_no_judge_at_work() -> None:
    class Stopped(Redness):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            raise ScorerStoppedError("gone")

    with pytest.raises(ScorerStoppedError, match="gone"):
        evaluated(make_policy(), "base", PROMPTS, SETTINGS, [Stopped()], 0, batch_size=3)

    done: list[int] = []

    class Slow(Redness):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            time.sleep(0.1)
            done.append(len(prompts))
            return super().score(images, prompts)

    ticks: list[None] = []

    def interrupt() -> None:
        ticks.append(None)
        if len(ticks) == 6:  # the second batch is drawn, the first is judged
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        evaluated(make_policy(), "base", PROMPTS, SETTINGS, [Slow()], 0, interrupt, batch_size=3)
    assert done == [3]
    assert not any(thread.name == "scoring" for thread in threading.enumerate())


def test_judges_see_the_eight_bit_image() -> None:
    judge = Redness()
    result = evaluated(make_policy(), "base", PROMPTS, SETTINGS, [judge], 0)
    seen = torch.cat(judge.seen)
    assert torch.equal(seen * 255, torch.round(seen * 255))
    # A mean over 64 pixels in float32, each rounded by 6e-8: 4e-6 if all round the same way.
    assert result.scores["redness"] == pytest.approx(result.images[..., 0].mean(axis=(1, 2)) / 255, abs=4e-6)


def test_failures_become_nan_and_stay_so_on_disk(tmp_path: FolderPath) -> None:
    judges = [Redness("picky", fails="word 2"), Redness("broken", fails="raise")]
    result = evaluated(
        make_policy(), "base", PROMPTS, SETTINGS, judges, 0, train_rewards=[Redness("train"), Redness("looked at")],
        watched=["looked at"],
    )  # fmt: skip
    assert np.isnan(result.scores["picky"]).sum() == 2
    assert np.isnan(result.scores["broken"]).all()
    assert result.roles == {"picky": "heldout", "broken": "heldout", "train": "train", "looked at": "watch"}
    loaded = load_suite(save_suite(result, tmp_path / "base"))
    assert np.array_equal(loaded.images, result.images)
    for name, values in result.scores.items():
        assert np.array_equal(loaded.scores[name], values, equal_nan=True)
    for fact in ("version", "prompts", "vendi", "kl", "sampler", "scorers", "network_evaluations", "seed"):
        assert vars(loaded)[fact] == vars(result)[fact]


def test_half_written_evaluations_are_not_complete(tmp_path: FolderPath) -> None:
    folder = save_suite(
        evaluated(make_policy(), "base", PROMPTS, SETTINGS, [Redness()], 0), tmp_path / "base"
    )
    assert is_saved(folder)
    (folder / "images" / "00003.png").unlink()
    with pytest.raises(DataError, match="delete the folder"):
        load_suite(folder)
    (folder / "suite.json").unlink()
    assert not is_saved(folder)
    with pytest.raises(MissingError, match="did not finish"):
        load_suite(folder)


def test_vendi_and_kl_can_be_off_and_interruption_passes_through() -> None:
    settings = SETTINGS.model_copy(update={"kl_prompts": 0, "vendi_prompts": 0})
    result = evaluated(make_policy(), "moved", PROMPTS, settings, [Redness()], 0, embedder=PIXELS)
    assert result.kl == [] and result.vendi == {} and result.vendi_images == 0 and len(result.images) == 12
    ticks: list[int] = []

    def stop() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(make_policy(), "moved", PROMPTS, settings, [Redness()], 0, stop)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(DataError, match="no prompt"):
        evaluated(make_policy(), "base", [], SETTINGS, [Redness()], 0)
    with pytest.raises(DataError, match="different names"):
        evaluated(make_policy(), "base", PROMPTS, SETTINGS, [Redness(), Redness()], 0)


def test_prompts_are_chosen_by_seed_not_by_position() -> None:
    chosen = choose_prompts(PROMPTS, 3, 0)
    assert chosen == choose_prompts(PROMPTS[::-1], 3, 0) and len(chosen) == 3
    assert choose_prompts(PROMPTS, 5, 0)[:3] == chosen
    assert any(choose_prompts(PROMPTS, 3, seed) != chosen for seed in range(1, 5))
    assert choose_prompts([*PROMPTS, replace(PROMPTS[0])], 99, 0) == choose_prompts(PROMPTS, 99, 0)
