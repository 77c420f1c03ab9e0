"""The methods learn: samples move to where the winners are, on unseen pairs too, and exploring online gets further.

Every bound is many standard errors wide of chance; the numbers found are several times larger.
"""

import math

import pytest
import torch

from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.online.cost import offline_steps_of_equal_cost
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from tests.learning.toy import (
    SidePairs,
    contrast_margins,
    draw,
    make_loop,
    make_policy,
    margins,
    online_config,
    reward_of,
    train_offline,
)

STEPS, RATE = 100, 2e-3
ONLINE_RATE = {"full": 2e-3, "lora": 6e-3}
ONLINE_STEPS = {"full": 60, "lora": 100}


def settings(alpha=0.0, kind="expo"):
    return ExpoConfig(beta=10.0, alpha=alpha) if kind == "expo" else DiffusionDpoConfig(beta=10.0)


def standard_errors(after, before):
    """How many standard errors the mean of `after` lies above that of `before`."""
    spread = math.sqrt(float(after.var()) / len(after) + float(before.var()) / len(before))
    return float(after.mean() - before.mean()) / spread


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_the_base_draws_a_standard_normal(path):
    samples = draw(make_policy(path, "full"), "base")
    assert samples.mean(dim=0).abs().max() < 0.1
    assert ((samples.std(dim=0) - 1).abs() < 0.2).all()


@pytest.mark.parametrize(
    ("path", "tuning", "alpha"),
    [("vp", "full", 0.1), ("vp", "lora", 0.0), ("flow", "full", 0.0), ("flow", "lora", 0.1)],
)
def test_samples_move_to_the_winners_side(path, tuning, alpha, tmp_path):
    policy = make_policy(path, tuning)
    heldout = SidePairs(policy, 256, name="heldout").batch(0)
    before = draw(policy, "current")
    reference = policy.weights.fingerprint("reference")
    assert torch.equal(margins(policy, heldout, draws=1), torch.zeros(256))

    loader = SidePairs(policy, 64, contrast=16 if alpha else 0)
    train_offline(policy, settings(alpha), loader, tmp_path, STEPS, RATE)

    after = draw(policy, "current")
    assert standard_errors(after[:, 0], before[:, 0]) > 40
    # The axis that decides nothing stays where it was (only the bonus may pull on it, a little).
    assert float(after[:, 1].mean() - before[:, 1].mean()) < 0.3 * float(
        after[:, 0].mean() - before[:, 0].mean()
    )
    accuracy = float((margins(policy, heldout) > 0).float().mean())
    assert accuracy > 0.5 + 10 * 0.5 / math.sqrt(256)
    assert policy.weights.fingerprint("reference") == reference
    assert torch.equal(draw(policy, "reference"), before) and torch.equal(draw(policy, "base"), before)


def test_flipped_labels_move_samples_to_the_other_side(tmp_path):
    policy = make_policy("vp", "full")
    loader = SidePairs(policy, 64, flipped=True)
    before = draw(policy, "current")
    train_offline(policy, settings(), loader, tmp_path, STEPS, RATE)
    assert standard_errors(before[:, 0], draw(policy, "current")[:, 0]) > 40


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_pairs_without_information_teach_nothing(path, tmp_path):
    policy = make_policy(path, "full")
    before = draw(policy, "current")
    train_offline(policy, settings(), SidePairs(policy, 64, blind=True), tmp_path, STEPS, RATE)
    # With labels the same training moves the first axis by 2 to 3.
    assert (draw(policy, "current").mean(dim=0) - before.mean(dim=0)).abs().max() < 0.5


def test_expo_with_alpha_0_is_diffusion_dpo_bit_for_bit(tmp_path):
    states = []
    for kind, contrast in (("diffusion_dpo", 0), ("expo", 16)):
        policy = make_policy("flow", "lora")
        loader = SidePairs(policy, 32, contrast=contrast)
        train_offline(policy, settings(kind=kind), loader, tmp_path / kind, 10, RATE)
        states.append(policy.weights.fingerprint("current"))
    assert states[0] == states[1] != make_policy("flow", "lora").weights.fingerprint("current")


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_the_bonus_raises_the_implicit_reward_of_explored_samples(path, tmp_path):
    found = {}
    for alpha in (0.0, 1.0):
        policy = make_policy(path, "full")
        loader = SidePairs(policy, 32, contrast=32, blind=True)
        train_offline(policy, settings(alpha), loader, tmp_path / str(alpha), STEPS, RATE)
        found[alpha] = contrast_margins(policy, SidePairs(policy, 256, contrast=256, name="heldout").batch(0))
    assert standard_errors(found[1.0], found[0.0]) > 10
    assert float((found[1.0] > 0).float().mean()) > 0.5 + 10 * 0.5 / math.sqrt(256)


@pytest.mark.parametrize(
    ("path", "tuning", "alpha"), [("vp", "full", 0.0), ("vp", "full", 0.1), ("flow", "lora", 0.1)]
)
def test_the_online_loop_beats_one_offline_iteration(path, tuning, alpha, tmp_path):
    training = {"steps": ONLINE_STEPS[tuning], "learning_rate": ONLINE_RATE[tuning]}
    config = online_config(path, algorithm={"alpha": alpha}, training=training)
    policy = make_policy(path, tuning)
    rewards = [reward_of(draw(policy, "base"))]
    reference = policy.weights.fingerprint("base")
    loop = make_loop(config, policy, tmp_path / "run")
    run_loop(
        loop,
        {
            **STAGES,
            "evaluate": lambda loop, iteration: rewards.append(reward_of(draw(loop.policy, "current"))),
        },
    )
    assert len(rewards) == 4
    assert standard_errors(rewards[3], rewards[0]) > 20
    assert standard_errors(rewards[3], rewards[1]) > 10
    assert policy.weights.fingerprint("base") == policy.weights.fingerprint("reference") == reference
    assert [len(loop.store.samples(iteration)) for iteration in (1, 2)] == [192, 192]
    assert {pair.source for pair in loop.store.pairs()} == {"offline", "online"}

    # Not because it trained longer: as many network evaluations spent on the offline pairs alone fall short too.
    steps = offline_steps_of_equal_cost(config)
    alone = online_config(path, explore={"iterations": 1}, training=training | {"steps": steps})
    policy = make_policy(path, tuning)
    run_loop(
        make_loop(alone, policy, tmp_path / "alone"), {**STAGES, "evaluate": lambda loop, iteration: None}
    )
    assert standard_errors(rewards[3], reward_of(draw(policy, "current"))) > 10


def test_the_loop_started_again_ends_with_the_same_weights(tmp_path):
    config = online_config("vp", training={"steps": 6})
    whole = make_loop(config, make_policy("vp", "full"), tmp_path / "whole", offline_pairs=32)
    run_loop(whole, {**STAGES, "evaluate": lambda loop, iteration: None})
    for until in (("train", 1), ("collect", 1), ("pair", 2), None):
        parts = make_loop(config, make_policy("vp", "full"), tmp_path / "parts", offline_pairs=32)
        run_loop(parts, {**STAGES, "evaluate": lambda loop, iteration: None}, until)
    assert parts.policy.weights.fingerprint("current") == whole.policy.weights.fingerprint("current")
    assert parts.store.pairs() == whole.store.pairs()
