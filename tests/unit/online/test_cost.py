import pytest
import torch

from diffexpo.config import RunConfig
from diffexpo.config.methods import offline_baseline
from diffexpo.config.methods.data import Pairs
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.config.schema import TrainingConfig
from diffexpo.online.cost import (
    check_cost,
    evaluations_of_row,
    offline_steps_of_equal_cost,
    run_cost,
    sampling_cost,
    training_cost,
)
from diffexpo.online.loop import run as run_loop
from diffexpo.online.loop import schedule
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyPolicy
from tests.learning.toy import PATHS, make_loop, online_config


def config(alpha=0.0, guidance=7.5, iterations=4, **training):
    explore = {
        "iterations": iterations,
        "prompts_per_iteration": 10,
        "images_per_prompt": 3,
        "sampler": {"name": "ddim", "steps": 20, "guidance": guidance},
        "negatives": {"source": None},
    }
    values = {"steps": 50, "batch_size": 16, "micro_batch_size": 4} | training
    return RunConfig.model_validate({"explore": explore, "training": values, "algorithm": {"alpha": alpha}})


def pair_cost():
    return evaluations_of_row(DiffusionDpoConfig(), TrainingConfig(), is_guided=False)


def test_a_pair_costs_eight():
    # policy and reference on winner and loser, and a backward of twice the policy's forward
    assert pair_cost() == 2 + 2 + 2 * 2


def test_cost_by_hand():
    cost = run_cost(config())
    assert cost.images == 3 * 10 * 6
    assert cost.sampling == cost.images * 20 * 2
    assert cost.training == 4 * 50 * 16 * 8
    # From the second iteration on the policy starts apart from the base: four pairs run once more, forward only.
    assert cost.checks == 3 * 4 * 4
    assert cost.total == 7200 + 25600 + 48
    assert cost.split == "7,200 sampling, 25,600 training, 48 checking"
    assert (cost.pairs_trained, cost.optimizer_steps) == (3200, 200)


def test_no_guidance_halves_the_sampling():
    assert 2 * run_cost(config(guidance=1.0)).sampling == run_cost(config()).sampling
    assert sampling_cost(config(guidance=0.0), 1) == 40  # 0 is guidance too: the unconditional half alone


def test_the_bonus_costs_from_the_second_iteration_on():
    plain, bonus = config(), config(alpha=0.1)
    assert training_cost(bonus, 1) == training_cost(plain, 1) == 50 * 16 * 8
    assert training_cost(bonus, 2) == training_cost(bonus, 4) == 50 * (16 + 4) * 8
    assert run_cost(bonus).training - run_cost(plain).training == 3 * 50 * 4 * 8
    assert check_cost(bonus, 2) - check_cost(plain, 2) == 4  # one contrast pair goes with four pairs


@pytest.mark.parametrize(
    ("batch", "fraction", "expected"),
    [(16, 0.25, 4), (16, 0.0, 0), (2, 0.01, 1), (512, 1.0, 512), (10, 0.26, 3)],
)
def test_contrast_pairs(batch, fraction, expected):
    assert Pairs(fraction).contrast_pairs(batch) == expected


@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("iterations", [2, 5])
def test_offline_steps_of_equal_cost_cost_the_same(alpha, iterations):
    whole = config(alpha, iterations=iterations)
    steps = offline_steps_of_equal_cost(whole)
    alone = config(iterations=1, steps=steps)
    assert run_cost(alone).sampling == run_cost(alone).images == 0
    both = (run_cost(alone), run_cost(whole))
    spent = [cost.sampling + cost.training for cost in both]
    assert abs(spent[0] - spent[1]) <= 16 * pair_cost() / 2


def test_the_baseline_shares_the_settings_and_has_the_base_as_its_reference():
    held = ExpoConfig(reference="ema", beta=250.0, draws=4, anchor_weight=0.02, anchor_guidance=2.5)
    baseline = offline_baseline(held)
    shared = ("beta", "draws", "anchor_weight", "anchor_guidance", "timestep_range")
    assert [getattr(baseline, name) for name in shared] == [getattr(held, name) for name in shared]
    assert (baseline.reference, baseline.anchor_version) == ("base", "reference")
    # Policy 1 and its backward 2, reference 1, anchor 2 or, where the reference is one of its branches, 1.
    rows = [evaluations_of_row(settings, TrainingConfig(), is_guided=False) for settings in (held, baseline)]
    assert rows == [2 * 4 * 6, 2 * 4 * 5]
    once = held.model_copy(update={"anchor_draws": 1})
    assert evaluations_of_row(once, TrainingConfig(), is_guided=False) == 2 * (4 * 4 + 2)


def test_a_run_without_sampling_equals_itself():
    assert offline_steps_of_equal_cost(config(iterations=1)) == 50


def test_a_reference_in_another_precision_is_looked_at_before_every_first_step():
    def checks(precision, trained):
        model = config().model.model_copy(update={"inference_precision": precision})
        training = config().training.model_copy(update={"mixed_precision": trained})
        return [
            check_cost(config().model_copy(update={"model": model, "training": training}), t) for t in (1, 2)
        ]

    assert checks("no", "bf16") == checks("bf16", "bf16") == [0, 16]
    assert checks("bf16", "no") == [16, 16]


def test_without_offline_pairs_the_first_iteration_trains_nothing():
    whole = config()
    online = whole.model_copy(update={"offline": whole.offline.model_copy(update={"source": None})})
    assert training_cost(online, 1) == 0 and training_cost(online, 2) == training_cost(whole, 2)
    assert run_cost(whole).training - run_cost(online).training == training_cost(whole, 1)
    assert (run_cost(online).optimizer_steps, run_cost(online).pairs_trained) == (150, 2400)


class CountingPolicy(ToyPolicy):
    """Counts network evaluations: rows of every forward, and of those that a backward follows."""

    forwards = backwards = 0

    def predict(self, x_t, t, conditioning):
        self.forwards += len(x_t)
        self.backwards += len(x_t) if torch.is_grad_enabled() else 0
        return super().predict(x_t, t, conditioning)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_the_arithmetic_is_what_a_run_does(alpha, tmp_path):
    changes = {"steps": 3, "batch_size": 8, "micro_batch_size": 8}
    settings = online_config("vp", algorithm={"alpha": alpha}, training=changes)
    policy = CountingPolicy(PATHS["vp"])
    loop = make_loop(settings, policy, tmp_path, offline_pairs=16)
    for stage, iteration in schedule(settings):
        policy.forwards = policy.backwards = 0
        run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None}, (stage, iteration))
        if stage == "collect":
            assert (policy.forwards, policy.backwards) == (sampling_cost(settings, 192), 0)
        if stage == "train":
            # The start is checked on the first step; where current is not the reference, half of its pairs run
            # once more, without gradient.
            pairs = 8 + (2 if alpha and iteration > 1 else 0)
            assert policy.backwards == 3 * pairs * 2
            assert check_cost(settings, iteration) == (pairs // 2 * 4 if iteration > 1 else 0)
            spent = training_cost(settings, iteration) + check_cost(settings, iteration)
            assert policy.forwards + 2 * policy.backwards == spent
            line = loop.store.manifest("train", iteration)
            assert line["cost/network_evaluations"] == spent
