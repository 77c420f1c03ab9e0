"""Recipes of the scenes with several rewards, small: on the shipped base, from the first image to the judges' scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffexpo import assembly
from diffexpo.cli.progress import Console
from diffexpo.config import load_config
from diffexpo.data.store import Store
from diffexpo.evaluation.records import load_suite

SMALL = (
    "model.device=cpu",
    "explore.iterations=2",
    "explore.prompts_per_iteration=6",
    "explore.images_per_prompt=2",
    "explore.sampler.steps=2",
    "pairing.min_margin=0",
    "training.steps=1",
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "evaluation.num_prompts=4",
    "evaluation.sampler.steps=2",
    "evaluation.kl_prompts=0",
    "evaluation.vendi_prompts=1",
    "evaluation.vendi_images=2",
)


def test_two_rewards_rank_together_and_two_others_judge(tmp_path: Path) -> None:
    config = load_config(["scenes/expo_multi"], SMALL, {}).config
    folder = tmp_path / "run"
    assembly.run(config, folder, sources={}, resume=False, console=Console(), stop_after="train-2")
    store = Store(folder / "store")
    samples = {sample.sample_id: sample for sample in store.samples(1)}
    weights = {"score": 1.0, "looks": 0.5}
    rewards = {name: np.array([each.rewards[name] for each in samples.values()]) for name in weights}
    assert len(samples) == 6 * 2 * 2 and all(np.isfinite(values).all() for values in rewards.values())
    # The mixture as the recipe's comment states it: standardised over the collection, looks at half weight.
    mixed = dict.fromkeys(samples, 0.0)
    for name, weight in weights.items():
        for key, value in zip(
            samples, (rewards[name] - rewards[name].mean()) / rewards[name].std(), strict=True
        ):
            mixed[key] += weight * value
    pairs = store.pairs(1)
    assert len(pairs) >= 5
    for pair in pairs:
        assert np.isclose(pair.margin, mixed[pair.winner_id] - mixed[pair.loser_id], atol=1e-4)
        group = [key for key, each in samples.items() if each.prompt_id == samples[pair.winner_id].prompt_id]
        assert mixed[pair.winner_id] == max(mixed[key] for key in group)
    assert (folder / "checkpoints" / "weights-0002.safetensors").is_file()
    suite = load_suite(folder / "eval" / "base")
    assert {"correct", "heldout_looks"} <= set(suite.scores)
    assert np.isfinite(suite.scores["heldout_looks"]).all()
    assert set(np.unique(suite.scores["correct"])) <= {0.0, 1.0}
    assert suite.embedder == "32x32 pixels"


def test_a_reward_over_the_images_of_a_prompt_trains_though_no_evaluation_has_it(tmp_path: Path) -> None:
    config = load_config(["scenes/balance"], SMALL, {}).config
    folder = tmp_path / "run"
    assembly.run(config, folder, sources={}, resume=False, console=Console(), stop_after="train-2")
    samples = Store(folder / "store").samples(1)
    assert all(np.isfinite([each.rewards["gender"], each.rewards["skin_tone"]]).all() for each in samples)
    base = load_suite(folder / "eval" / "base").scores
    assert "score" in base and not {"gender", "skin_tone"} & set(base)
    assert (folder / "checkpoints" / "weights-0002.safetensors").is_file()
