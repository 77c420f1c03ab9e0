"""The methods on trajectories learn on the toy policy: pictures move to where the reward is, whatever drew them.

Every bound is many standard errors wide of chance; the numbers found are several times larger.
"""

import json
import math
from dataclasses import replace

import pytest
import torch

from diffexpo.config import RunConfig
from diffexpo.errors import ConfigError, TrainingError
from diffexpo.online.advantages import group_advantages
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.online.trajectories import check_replay, iteration_sampler, trajectories_of
from tests.learning.toy import draw, make_loop, make_policy, reward_of

SAMPLERS = {
    "vp": {"name": "ddim", "steps": 6, "guidance": 1.0, "eta": 1.0},
    "ddpm": {"name": "ddpm", "steps": 6, "guidance": 1.0},
    "flow": {"name": "flow_sde", "steps": 6, "guidance": 1.0},
    "dance": {"name": "flow_sde", "steps": 6, "guidance": 1.0, "sde": "dance", "noise_level": 0.3},
    "cps": {"name": "flow_sde", "steps": 6, "guidance": 1.0, "sde": "cps"},
}
DDPO = {"type": "ddpo", "clip_range": 0.05}
GRPO = {"type": "flow_grpo", "clip_range": 0.05}
CASES = {
    "ddpo": ("vp", DDPO),
    "ddpo, score function": ("vp", {"type": "ddpo", "estimator": "score_function"}),
    "ddpo on a flow": ("flow", DDPO),
    "ddpo, half of the steps, ddpm": ("ddpm", {**DDPO, "timestep_fraction": 0.5}),
    "dpok": ("vp", {"type": "dpok", "clip_range": 0.05}),
    "dpok without baseline, gaussian": (
        "vp",
        {"type": "dpok", "clip_range": 0.05, "kl": "gaussian", "kl_weight": 1.0},
    ),
    "d3po": ("vp", {"type": "d3po", "beta": 0.5, "clip_range": 0.5}),
    "d3po on a flow": ("flow", {"type": "d3po", "beta": 0.5, "clip_range": 0.5}),
    "spo": (
        "vp",
        {"type": "spo", "num_candidates": 3, "first_transition": 1, "threshold": 0.01, "clip_range": 0.5},
    ),
    "prdp": ("vp", {"type": "prdp", "beta": 0.1, "clip_range": 0.1}),
    "flow_grpo": ("flow", GRPO),
    "flow_grpo on a diffusion model": ("vp", {**GRPO, "kl": "exact", "global_std": False}),
    "dance": ("dance", GRPO),
    "cps": ("cps", {**GRPO, "kl": "exact"}),
    "guard": ("flow", {**GRPO, "ratio": "guard", "clip_range": 0.02}),
    "mix_grpo": ("flow", {**GRPO, "window": 3, "window_every": 1}),
}


def make_config(sampler, algorithm, *, iterations=3, images=4, **training):
    one_step = algorithm.get("estimator") == "score_function"
    values = {
        "steps": 1 if one_step else 4,
        "batch_size": 128,
        "micro_batch_size": 128,
        "learning_rate": 1e-2 if one_step else 3e-3,
        "weight_decay": 0.0,
        "warmup_fraction": 0.0,
    }
    explore = {
        "iterations": iterations,
        "prompts_per_iteration": 12,
        "images_per_prompt": images,
        "sampler": SAMPLERS[sampler],
        "batch_size": 48,
        "negatives": {"source": None},
    }
    return RunConfig.model_validate(
        {
            "explore": explore,
            "offline": {"source": None},
            "algorithm": algorithm,
            "tuning": {"kind": "full"},
            "training": values | training,
        }
    )


def make_toy(sampler, algorithm, folder, **changes):
    config = make_config(sampler, algorithm, **changes)
    kind = "flow" if config.explore.sampler.name == "flow_sde" else "vp"
    return make_loop(config, make_policy(kind, "full"), folder)


def metric_lines(folder, phase):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def standard_errors(after, before):
    spread = math.sqrt(float(after.var()) / len(after) + float(before.var()) / len(before))
    return float(after.mean() - before.mean()) / spread


@pytest.mark.parametrize(("sampler", "algorithm"), CASES.values(), ids=CASES.keys())
def test_a_method_learns(sampler, algorithm, tmp_path):
    loop = make_toy(sampler, algorithm, tmp_path)
    before = reward_of(draw(loop.policy, "base"))
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    after = reward_of(draw(loop.policy, "current"))
    assert standard_errors(after, before) > 5
    first = metric_lines(tmp_path, "train")[0]
    if "train/ratio" in first:
        # Exact where the batch is the rollout's; here rows are shuffled, and rounding belongs to a batch's shape.
        assert first["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert "optimizer-0003.safetensors" in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert not list((tmp_path / "trajectories").iterdir())


def test_a_blind_reward_teaches_nothing(tmp_path):
    loop = make_toy("vp", DDPO, tmp_path)
    chance = torch.Generator().manual_seed(0)
    loop.score = lambda drawn, texts: {"near": torch.randn(len(texts), generator=chance).numpy()}
    before = draw(loop.policy, "base")
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    assert (draw(loop.policy, "current").mean(dim=0) - before.mean(dim=0)).abs().max() < 0.5


def test_equal_rewards_leave_the_policy_as_it_is(tmp_path):
    def by_prompt(drawn, texts):
        level = {text: float(place) for place, text in enumerate(sorted(set(texts)))}
        return {"near": torch.tensor([level[text] for text in texts]).numpy()}

    def equal(drawn, texts):
        return {"near": torch.ones(len(texts)).numpy()}

    for name, algorithm, score in (("grpo", {**GRPO, "kl": "exact"}, by_prompt), ("ddpo", DDPO, equal)):
        loop = make_toy("vp", algorithm, tmp_path / name, iterations=2)
        heard = []
        loop.console.warning = heard.append
        loop.score = score
        # The start-up check refuses a reward that is the same for all images; here that is what is looked at.
        loop.ranking = replace(loop.ranking, check=lambda scores: None)
        start = loop.policy.weights.fingerprint("current")
        run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
        assert loop.policy.weights.fingerprint("current") == start
        assert ["no transition has anything to teach" in text for text in heard] == [True, True]
        assert [
            row["rollout/advantage/zero_fraction"] for row in metric_lines(tmp_path / name, "collect")
        ] == [1.0, 1.0]


def test_failed_rewards_are_left_out_and_counted(tmp_path):
    for name, algorithm in (
        ("grpo", {**GRPO, "kl": "exact"}),
        ("dpok", CASES["dpok"][1]),
        ("prdp", CASES["prdp"][1]),
    ):
        loop = make_toy("vp", algorithm, tmp_path / name, iterations=1)
        plain = loop.score

        def score(drawn, texts, plain=plain):
            found = plain(drawn, texts)["near"].copy()
            found[::4] = float("nan")
            return {"near": found}

        loop.score = score
        run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
        assert metric_lines(tmp_path / name, "collect")[0]["rollout/advantage/dropped"] == 12
        summary = metric_lines(tmp_path / name, "train_summary")[0]
        # 12 prompts of 3 images that have a reward, or 3 pairs of them; the last of 6 steps of this sampler is certain, and
        # Flow-GRPO leaves out one more.
        assert summary["transitions/available"] == 12 * 3 * (4 if name == "grpo" else 5)
        assert all(math.isfinite(row["train/loss"]) for row in metric_lines(tmp_path / name, "train"))


def test_a_group_of_one_teaches_ddpo_through_the_batch_and_is_refused_for_grpo(tmp_path):
    loop = make_toy("vp", DDPO, tmp_path / "ddpo", iterations=1, images=1)
    start = loop.policy.weights.fingerprint("current")
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    assert loop.policy.weights.fingerprint("current") != start
    with pytest.raises(ConfigError, match="gives 1 images of a prompt, but .* compares 2 or more"):
        make_toy("vp", {**GRPO, "kl": "exact"}, tmp_path / "grpo", iterations=1, images=1)
    for global_std in (False, True):
        assert not group_advantages([3.0, 5.0], ["a", "b"], global_std=global_std).any()


def test_a_policy_other_than_the_one_that_drew_is_refused(tmp_path):
    loop = make_toy("vp", DDPO, tmp_path)
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None}, until=("collect", 1))
    check_replay(loop, 1)
    with torch.no_grad():
        next(iter(loop.policy.weights.trainable().values())).add_(1e-3)
    with pytest.raises(TrainingError, match="differ by .* expected 0"):
        check_replay(loop, 1)


def test_the_loop_started_again_ends_with_the_same_weights(tmp_path):
    for name in ("ddpo", "dpok", "spo"):
        sampler, algorithm = CASES[name]
        small = {"iterations": 2, "steps": 2, "batch_size": 32, "micro_batch_size": 32}
        whole = make_toy(sampler, algorithm, tmp_path / name / "whole", **small)
        run_loop(whole, {**STAGES, "evaluate": lambda loop, iteration: None})
        for until in (("collect", 1), ("train", 1), None):
            parts = make_toy(sampler, algorithm, tmp_path / name / "parts", **small)
            run_loop(parts, {**STAGES, "evaluate": lambda loop, iteration: None}, until)
        assert parts.policy.weights.fingerprint("current") == whole.policy.weights.fingerprint("current")


def test_the_window_of_mix_grpo_moves_and_only_its_steps_are_random(tmp_path):
    loop = make_toy("flow", CASES["mix_grpo"][1], tmp_path)
    assert [iteration_sampler(loop, t).random_steps for t in (1, 2, 3, 4, 5)] == [
        (0, 3), (1, 4), (2, 5), (3, 6), (0, 3),
    ]  # fmt: skip
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None}, until=("collect", 2))
    trajectories = trajectories_of(loop, 2)
    log_probs = trajectories.part(0, "log_probs")
    assert [bool((row != 0).any()) for row in log_probs] == [False, True, True, True, False, False]
