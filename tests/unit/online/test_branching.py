"""SPO's branches under a step-aware judge: what it is shown, what it changes and what it leaves as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms.spo import spo_min_margin
from diffexpo.diffusion.transitions import stochastic_grid
from diffexpo.online.cost import sampling_cost
from diffexpo.online.loop import Loop
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.online.trajectories import trajectories_of
from tests.learning.test_trajectories import SAMPLERS, make_config, standard_errors
from tests.learning.toy import TARGET, draw, make_loop, make_policy, reward_of

SPO = {"type": "spo", "num_candidates": 3, "first_transition": 1, "threshold": 0.01, "clip_range": 0.5}


class KnowsTheAim:
    """A judge of the toy's states: the reward at E[x0 | x_t], which is x_t times the share of signal in its variance."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign
        self.seen: list[tuple[float, float, Tensor, tuple[str, ...]]] = []

    def score(self, x_t: Tensor, alpha_t: float, sigma_t: float, prompts: list[str]) -> Tensor:
        self.seen.append((alpha_t, sigma_t, x_t.clone(), tuple(prompts)))
        expected = alpha_t * x_t[:, 0, 0, 0] / (alpha_t**2 + sigma_t**2)
        return -10 * self.sign * (torch.sigmoid(expected) - TARGET) ** 2


def loop_with(folder: Path, judge: KnowsTheAim | None, kind: str = "vp", **changes: int) -> Loop:
    algorithm = SPO if judge is None else {**SPO, "judge": "mine"}
    config = make_config(kind, algorithm, **changes)
    return replace(make_loop(config, make_policy(kind, "full"), folder, offline_pairs=1), step_judge=judge)


def collected(loop: Loop) -> dict[str, Tensor]:
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None}, until=("collect", 1))
    trajectories = trajectories_of(loop, 1)
    names = (
        "latents",
        "log_probs",
        *(f"branch_{name}" for name in ("x_t", "winner", "loser", "scores", "index", "row")),
    )
    return {name: trajectories.part(0, name) for name in names}


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_the_judge_sees_every_candidate_at_the_level_the_step_leads_to(tmp_path: Path, kind: str) -> None:
    judge = KnowsTheAim()
    loop = loop_with(tmp_path, judge, kind)
    found = collected(loop)
    grid = stochastic_grid(loop.policy.path, loop.config.explore.sampler)
    branched = [step for step in grid[1:] if step.has_density]
    first = judge.seen[: 3 * len(branched)]  # of the first unit
    assert [seen[:2] for seen in first] == [
        (step.alpha_s, step.sigma_s) for step in branched for _ in range(3)
    ]
    # The next state of each trajectory is one of the candidates that were shown.
    for number in range(len(branched)):
        shown = torch.stack([seen[2] for seen in first[3 * number : 3 * number + 3]])
        following = found["latents"][2 + number]
        assert ((shown == following).flatten(2).all(dim=-1).sum(dim=0) >= 1).all()
    texts = [seen[3] for seen in first]
    assert len(set(texts)) == 1 and len(texts[0]) == found["latents"].shape[1]


def test_winner_and_loser_are_the_judges(tmp_path: Path) -> None:
    loop = loop_with(tmp_path, KnowsTheAim())
    found = collected(loop)
    grid = stochastic_grid(loop.policy.path, loop.config.explore.sampler)
    places = found["branch_index"]
    alpha, sigma = (torch.tensor([getattr(grid[i], name) for i in places]) for name in ("alpha_s", "sigma_s"))
    for side, column in (("winner", 0), ("loser", 1)):
        expected = alpha * found[f"branch_{side}"][:, 0, 0, 0] / (alpha.square() + sigma.square())
        # Some tens of roundings of 6e-8, times 10.
        score = -10 * (torch.sigmoid(expected) - TARGET) ** 2
        torch.testing.assert_close(found["branch_scores"][:, column].float(), score, rtol=1e-5, atol=1e-5)
    margin = spo_min_margin(loop.config.algorithm.threshold)
    assert loop.config.algorithm.branches.min_margin == margin
    assert len(places) > 20 and bool((found["branch_scores"].diff(dim=1) < -margin).all())
    opposite = collected(loop_with(tmp_path / "opposite", KnowsTheAim(-1.0)))
    assert torch.equal(opposite["branch_winner"], found["branch_loser"])


def test_the_judge_changes_the_pairs_and_not_the_trajectories(tmp_path: Path) -> None:
    judged, rewarded = (
        collected(loop_with(tmp_path / name, judge))
        for name, judge in (("judge", KnowsTheAim()), ("rewards", None))
    )
    torch.testing.assert_close(judged["latents"], rewarded["latents"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(judged["log_probs"], rewarded["log_probs"], rtol=1e-5, atol=1e-5)
    assert judged["branch_winner"].shape != rewarded["branch_winner"].shape or not torch.equal(
        judged["branch_winner"], rewarded["branch_winner"]
    )


def test_candidates_cost_no_network_evaluation_under_a_judge(tmp_path: Path) -> None:
    class Counting:
        """The denoiser of a policy, counting the rows it is given."""

        def __init__(self, predict) -> None:
            self.predict, self.rows = predict, 0

        def __call__(self, x_t, t, conditioning):
            self.rows += len(x_t)
            return self.predict(x_t, t, conditioning)

    for judge in (KnowsTheAim(), None):
        loop = loop_with(tmp_path / str(judge is None), judge)
        loop.policy.predict = Counting(loop.policy.predict)
        found = collected(loop)
        images = len(loop.store.samples(1))
        assert found["latents"].shape[1] <= images
        assert loop.policy.predict.rows == sampling_cost(loop.config, images)
    assert SAMPLERS["vp"]["guidance"] == 1.0  # one evaluation a step


@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_spo_learns_from_a_step_aware_judge(tmp_path: Path, kind: str) -> None:
    loop = loop_with(tmp_path, KnowsTheAim(), kind)
    before = reward_of(draw(loop.policy, "base"))
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    assert standard_errors(reward_of(draw(loop.policy, "current")), before) > 5


def test_spo_unlearns_under_a_judge_of_the_opposite_mind(tmp_path: Path) -> None:
    loop = loop_with(tmp_path, KnowsTheAim(-1.0))
    before = reward_of(draw(loop.policy, "base"))
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    assert standard_errors(reward_of(draw(loop.policy, "current")), before) < -5
