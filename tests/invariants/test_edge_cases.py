"""What every method does with prompts that cannot teach: nothing silently, and failures are counted.

One collection of four prompts with four images each. How many images (or pairs of them) of each prompt are learned from:

    method                    told apart   all equal   one failed   one left   counted as
    expo, dpo, mapo, orpo     1            0           1            0          pairs/dropped_ties, pairs/dropped_nan
    d3po                      1            0           1            0          pairs/dropped_ties, pairs/dropped_nan
    spin                      4            4           4            4          no score decides
    sft (best)                1            1           1            1          the loader's line; the first of equal ones is best
    diffusion_kto             4            0           3            0          the loader's line
    guidance_distillation     4            4           4            4          no score is looked at
    rwr                       4            4           3            1          the loader's line; equal rewards weigh 1 each
    diffusion_nft, awm, dgpo  4            4           3            1          the loader's line; all equal or one left: advantage 0
    ddpo                      4            0           3            1          rollout/advantage/dropped, /zero_fraction; the one left is
                                                                               compared with the whole batch
    dpok                      4            4           3            1          rollout/advantage/dropped; compared with its learned value
    flow_grpo                 4            0           3            0          rollout/advantage/dropped, /zero_fraction
    prdp                      6            6           3            0          rollout/advantage/dropped; equal rewards: difference 0
    spo                       -            0           -            0          pairs/kept_fraction (candidates of a step, not images)

Where no prompt teaches anything, training is refused (methods on pairs, Diffusion-KTO, those with advantages) or the policy stays
as it is with a warning (methods on trajectories).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from diffexpo.config import RunConfig
from diffexpo.config.schema import TrainingConfig
from diffexpo.data.rows import Sample
from diffexpo.errors import DataError, TrainingError
from diffexpo.online.credit import reward_metrics
from diffexpo.online.loaders import batches_of
from diffexpo.online.loop import Loop
from diffexpo.online.stages.collect import collect
from diffexpo.online.stages.pair import pair
from diffexpo.online.stages.train import train
from diffexpo.online.trajectories import trajectories_of
from diffexpo.online.units import group_rows
from diffexpo.policies.toy import ToyPolicy
from diffexpo.training.engine import Engine
from diffexpo.training.metrics import MetricsWriter, read_metrics
from diffexpo.types import Batch, Drawn
from tests.invariants.every_method import DDIM, METHODS, SDE
from tests.learning.toy import PATHS, PROMPTS, make_loop
from tests.unit.algorithms import methods, trajectories

NAN = float("nan")
REWARDS = np.array(
    [
        [0.1, 0.9, 0.4, 0.3],
        [0.5, 0.5, 0.5, 0.5],
        [NAN, 0.2, 0.7, 0.1],
        [NAN, NAN, 0.6, NAN],
    ]
)
LEARNED = {
    "expo": (1, 0, 1, 0),
    "diffusion_dpo": (1, 0, 1, 0),
    "mapo": (1, 0, 1, 0),
    "orpo": (1, 0, 1, 0),
    "d3po": (1, 0, 1, 0),
    "spin": (4, 4, 4, 4),
    "sft": (1, 1, 1, 1),
    "diffusion_kto": (4, 0, 3, 0),
    "guidance_distillation": (4, 4, 4, 4),
    "rwr": (4, 4, 3, 1),
    "diffusion_nft": (4, 4, 3, 1),
    "awm": (4, 4, 3, 1),
    "dgpo": (4, 4, 3, 1),
    "ddpo": (4, 0, 3, 1),
    "dpok": (4, 4, 3, 1),
    "flow_grpo": (4, 0, 3, 0),
    "prdp": (6, 6, 3, 0),
}
COUNTED_AS_PAIRS = ("expo", "diffusion_dpo", "mapo", "orpo", "d3po")
TEACHES_NOTHING = np.array([[0.1] * 4, [0.5] * 4, [0.9] * 4, [0.3] * 4])


def make_collected(name: str, rewards: np.ndarray, folder: Path, **algorithm: object) -> Loop:
    """A loop whose first collection has images with these rewards (G, n), NaN where scoring failed."""
    _, settings, changes = METHODS[name]
    groups = {group: dict(values) for group, values in changes.items()}
    sampler = SDE if name == "flow_grpo" else DDIM
    groups["explore"] = {"iterations": 2, "sampler": sampler, "negatives": {"source": None}} | groups.get(
        "explore", {}
    )
    groups["training"] = {"steps": 1, "batch_size": 4, "micro_batch_size": 4}
    groups["tuning"] = {"kind": "full"}
    if name != "spin":
        groups["offline"] = {"source": None}
    config = RunConfig.model_validate(groups | {"algorithm": settings | algorithm})
    policy = ToyPolicy(PATHS["flow" if sampler is SDE else "vp"])
    loop = make_loop(config, policy, folder, offline_pairs=24)
    loop.embeddings.add(["", *(prompt.text for prompt in PROMPTS)])
    rows = [
        make_sample(config, group, place, float(reward), rewards.shape[1])
        for group, values in enumerate(rewards)
        for place, reward in enumerate(values)
    ]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(rows), *policy.latent_shape, generator=generator)
    loop.store.append_unit(1, 0, 0, rows, latents.numpy())
    loop.store.write_manifest("collect", 1, {})
    steps = config.explore.sampler.steps
    if config.algorithm.draws_first:
        kept = torch.randn(steps + 1, *latents.shape, generator=generator)
        trajectories_of(loop, 1).write(0, {"latents": kept, "log_probs": torch.zeros(steps, len(rows))})
    return loop


def make_sample(config: RunConfig, group: int, place: int, reward: float, images: int) -> Sample:
    return Sample(
        sample_id=f"0001-{group:06d}-{place:02d}",
        group=group,
        prompt_id=PROMPTS[group].id,
        prompt=PROMPTS[group].text,
        agent=("main", "exploration")[place % 2],
        batch_size=images,
        batch_position=group * images + place,
        sampler=json.dumps(config.explore.sampler.model_dump() | {"append_negatives": False}),
        rewards={"near": reward},
        source="online",
    )


def learned_images(name: str, loop: Loop) -> tuple[list[Batch], set[str]]:
    """Enough batches to see everything, and the images (or couples of them) that they hold."""
    if loop.config.algorithm.draws_first:
        if name == "d3po":
            pair(loop, 1)
        loader, _ = batches_of(loop, 1)
    else:
        if loop.config.algorithm.has_pairs:
            pair(loop, 1)
        loader = batches_of(loop, 2).loader
    batches = [loader.batch(step) for step in range(40)]
    return batches, {key.split("@")[0].split("/")[0] for batch in batches for key in batch.keys}


def group_of(name: str, loop: Loop) -> int:
    """The prompt's number of an image, of a couple of images or of a stored pair."""
    if name.startswith("pair-"):
        name = next(row.loser_id for row in loop.store.pairs(1) if row.pair_id == name)
    return int(name.split("-")[1])


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_from_each_prompt(name: str, tmp_path: Path) -> None:
    loop = make_collected(name, REWARDS, tmp_path, **({"min_count": 2} if name == "ddpo" else {}))
    batches, images = learned_images(name, loop)
    counts = Counter(group_of(image, loop) for image in images)
    assert tuple(counts[group] for group in range(4)) == LEARNED[name]
    failed = {f"0001-{group:06d}-{place:02d}" for group, place in np.argwhere(np.isnan(REWARDS))}
    if name not in ("spin", "guidance_distillation"):
        assert not any(part in failed for image in images for part in image.split("+"))
    for batch in batches:
        for values in (getattr(batch, field, None) for field in ("rewards", "advantages", "winner_reward")):
            assert values is None or torch.isfinite(values).all()


@pytest.mark.parametrize("name", COUNTED_AS_PAIRS)
def test_ties_and_failures_are_counted_by_pairing(name: str, tmp_path: Path) -> None:
    loop = make_collected(name, REWARDS, tmp_path)
    pair(loop, 1)
    row = next(row for row in read_metrics(tmp_path / "metrics.jsonl") if row["phase"] == "pair")
    assert (row["pairs/count"], row["pairs/dropped_ties"], row["pairs/dropped_nan"]) == (2, 1, 1)


@pytest.mark.parametrize("name", ["sft", "diffusion_kto", "rwr", "diffusion_nft", "awm", "dgpo"])
def test_failures_are_counted_in_the_loaders_line(name: str, tmp_path: Path) -> None:
    loop = make_collected(name, REWARDS, tmp_path)
    assert "4 without a score left out" in batches_of(loop, 2).loader.describe()


@pytest.mark.parametrize("name", ["ddpo", "dpok", "prdp", "flow_grpo"])
def test_failures_and_prompts_without_spread_are_counted_with_the_collection(
    name: str, tmp_path: Path
) -> None:
    loop = make_collected(name, REWARDS, tmp_path)
    counted = reward_metrics(loop, group_rows(loop.store.samples(1)))
    assert counted == {"rollout/advantage/dropped": 4, "rollout/advantage/zero_fraction": 0.5}


def test_weights_of_rwr_are_those_of_the_images_that_have_a_reward(tmp_path: Path) -> None:
    loop = make_collected("rwr", REWARDS, tmp_path)
    batches, _ = learned_images("rwr", loop)
    found = {
        key.split("@")[0]: float(weight)
        for batch in batches
        for key, weight in zip(batch.keys, batch.weight, strict=True)
    }
    sums = [
        sum(weight for image, weight in found.items() if group_of(image, loop) == group) for group in range(4)
    ]
    assert sums == pytest.approx([4, 4, 3, 1], rel=1e-6)
    assert {found[f"0001-000001-{place:02d}"] for place in range(4)} == {1.0}


@pytest.mark.parametrize("name", ["diffusion_nft", "awm", "dgpo"])
def test_images_that_nothing_is_known_of_have_advantage_0(name: str, tmp_path: Path) -> None:
    loop = make_collected(name, REWARDS, tmp_path)
    for batch in learned_images(name, loop)[0]:
        groups = [group_of(key.split("@")[0], loop) for key in batch.keys]
        assert [value == 0 for value in batch.advantages.tolist()] == [group in (1, 3) for group in groups]


# ---- no prompt teaches anything --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["expo", "diffusion_dpo", "mapo", "orpo"])
def test_only_ties_leave_no_pairs(name: str, tmp_path: Path) -> None:
    loop = make_collected(name, TEACHES_NOTHING, tmp_path)
    pair(loop, 1)
    with pytest.raises(DataError, match=r"iteration 2 has no pairs to train on.*pairs/dropped_ties"):
        batches_of(loop, 2)


@pytest.mark.parametrize(("name", "settings"), [("diffusion_kto", {}), ("sft", {"keep": "desirable"})])
def test_only_ties_leave_no_images(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    loop = make_collected(name, TEACHES_NOTHING, tmp_path, **settings)
    with pytest.raises(DataError, match="iteration 2 has no images to train on"):
        batches_of(loop, 2)


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        *((name, TEACHES_NOTHING) for name in ("ddpo", "d3po", "flow_grpo")),
        *((name, np.full((4, 4), NAN)) for name in ("ddpo", "dpok", "d3po", "flow_grpo", "prdp")),
    ],
)
def test_trajectories_that_teach_nothing_leave_the_policy_as_it_is(
    name: str, rewards: np.ndarray, tmp_path: Path
) -> None:
    loop = make_collected(name, rewards, tmp_path, **({"min_count": 2} if name == "ddpo" else {}))
    if name == "d3po":
        pair(loop, 1)
    heard: list[str] = []
    loop.console.warning = heard.append
    before = loop.policy.weights.fingerprint("current")
    train(loop, 1)
    assert len(heard) == 1 and "no transition has anything to teach" in heard[0]
    assert loop.policy.weights.fingerprint("current") == before
    summary = next(row for row in read_metrics(tmp_path / "metrics.jsonl") if row["phase"] == "train_summary")
    assert summary["transitions/available"] == 0


def test_candidates_that_are_tied_or_failed_make_no_pair(tmp_path: Path) -> None:
    _, settings, _ = METHODS["spo"]
    explore = {"iterations": 1, "prompts_per_iteration": 3, "images_per_prompt": 2, "sampler": DDIM}
    config = RunConfig.model_validate(
        {
            "algorithm": settings,
            "explore": explore | {"negatives": {"source": None}},
            "offline": {"source": None},
        }
    )
    loop = make_loop(config, ToyPolicy(PATHS["vp"]), tmp_path)
    loop.prompts = PROMPTS[:3]
    tied, failed, told_apart = (prompt.text for prompt in PROMPTS[:3])

    def score(drawn: Drawn, texts: list[str]) -> dict[str, np.ndarray]:
        values = drawn.images[:, 0].mean(dim=(1, 2)).double().numpy().copy()
        values[[text == tied for text in texts]] = 0.5
        values[[text == failed for text in texts]] = NAN
        return {"near": values}

    loop.score = score
    collect(loop, 1)
    loader, _ = batches_of(loop, 1)
    names = {key.split(":")[0] for step in range(20) for key in loader.batch(step).keys}
    prompts = {row.prompt for row in loop.store.samples(1) if row.sample_id in names}
    assert prompts == {told_apart}
    row = next(row for row in read_metrics(tmp_path / "metrics.jsonl") if row["phase"] == "collect")
    assert 0 < row["pairs/kept_fraction"] <= 1 / 3


@pytest.mark.parametrize("name", ["diffusion_nft", "awm", "dgpo", "prdp"])
def test_a_batch_without_differences_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    if name == "prdp":
        policy = trajectories.moved_policy("vp", moved=False)
        batch = trajectories.make_batch(name, policy)
        batch = replaced(batch, winner_reward=batch.loser_reward)
        algorithm = trajectories.make(name)
    else:
        policy = methods.make_policy(moved=False)
        batch = methods.make_batch(name, policy)
        batch = replaced(batch, advantages=torch.zeros_like(batch.advantages))
        algorithm = methods.make(name, policy)
    settings = TrainingConfig(batch_size=len(batch), micro_batch_size=len(batch))
    engine = Engine(policy, algorithm, settings, MetricsWriter(tmp_path / "metrics.jsonl"))
    with pytest.raises(TrainingError, match="no gradient reaches any of the 6 trained modules"):
        engine.train_iteration(1, Same(batch), steps=1, checkpoint_dir=tmp_path / "c", run_seed=0)


class Same:
    """The same batch in every step."""

    def __init__(self, batch: Batch) -> None:
        self.rows = batch

    def batch(self, step: int) -> Batch:
        return self.rows


def replaced(batch: Batch, **changes: torch.Tensor) -> Batch:
    from dataclasses import replace

    return replace(batch, **changes)
