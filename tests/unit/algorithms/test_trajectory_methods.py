"""The classes of the methods on trajectories feed their pure functions with transitions under the right
weights.

Rows are computed one by one in float64 and compared with the whole batch to 1e-10: a log-prob is a squared
difference over a variance down to 1e-3, which multiplies the roundings of 1e-16 of some hundreds of terms by
up to a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import (
    d3po_loss,
    ddpo_sf_loss,
    dpok_kl,
    dpok_policy_loss,
    flow_grpo_kl,
    guard_loss,
    guard_ratio,
    ppo_clip_loss,
    prdp_loss,
    spo_loss,
)
from diffexpo.diffusion import gaussian_kl, mean_log_prob
from diffexpo.diffusion.transitions import step_moments, stochastic_grid
from diffexpo.errors import DataError
from diffexpo.policies.toy import ToyPolicy
from diffexpo.types import Conditioning, LossOutput, TrajectoryBatch, TrajectoryPairBatch
from tests.unit.algorithms.methods import KEY, PATHS, gradients
from tests.unit.algorithms.trajectories import (
    IMAGES,
    SAMPLERS,
    SETTINGS,
    STEPS,
    make,
    make_batch,
    moved_policy,
)

pytestmark = pytest.mark.usefixtures("float64")
BOUND = 1e-10


def one_by_one(
    policy: ToyPolicy,
    batch: TrajectoryBatch | TrajectoryPairBatch,
    version: str,
    side: str = "",
    *,
    is_negative_fixed: bool = False,
) -> dict[str, Tensor]:
    """Log-prob, mean, std and guided noise of every row, each in a batch of one, from the grid's numbers."""
    grid = stochastic_grid(policy.path, batch.sampler)
    x_t, x_next = getattr(batch, f"{side}x_t"), getattr(batch, f"{side}x_next")
    found: dict[str, list[Tensor]] = {"log_prob": [], "mean": [], "std": [], "eps": []}
    for row, place in enumerate(batch.index.tolist()):
        step, x = grid[place], x_t[row : row + 1]

        def predict(side: Conditioning, x: Tensor = x, t: float = step.t, row: int = row) -> Tensor:
            return policy.predict(x, torch.tensor([t], dtype=torch.float32), side.select(slice(row, row + 1)))

        with policy.weights.use(version):
            positive, negative = predict(batch.conditioning), predict(batch.negative_conditioning)
        negative = negative.detach() if is_negative_fixed else negative
        guided = negative + batch.sampler.guidance * (positive - negative)
        mean, std = step_moments(policy.path, step, guided, x)
        found["log_prob"].append(mean_log_prob(x_next[row : row + 1], mean, std))
        found["mean"].append(mean)
        found["std"].append(std)
        found["eps"].append(policy.path.x0_eps_at(guided, x, step.alpha_t, step.sigma_t)[1])
    return {name: torch.cat(rows) for name, rows in found.items()}


def sigmas(policy: ToyPolicy, batch: TrajectoryBatch) -> dict[str, Tensor]:
    grid = stochastic_grid(policy.path, batch.sampler)
    rows = [(grid[place].sigma_t, grid[place].sigma_s) for place in batch.index.tolist()]
    here, there = torch.tensor(rows).T
    return {"sigma": here, "sigma_next": there}


def check(policy: ToyPolicy, output: LossOutput, expected: Tensor) -> None:
    torch.testing.assert_close(output.loss, expected, rtol=BOUND, atol=BOUND)
    total, count = output.metrics["train/loss"]
    assert float(total) / count == pytest.approx(float(expected.detach()), rel=BOUND)
    assert not any(total.requires_grad for total, _ in output.metrics.values())
    ours, theirs = gradients(policy, output.loss), gradients(policy, expected)
    for name, slope in theirs.items():
        largest = float(slope.abs().max())
        assert largest > 0
        torch.testing.assert_close(ours[name], slope, rtol=0, atol=BOUND * largest)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("estimator", ["importance_sampling", "score_function"])
def test_ddpo(estimator: str, kind: str) -> None:
    policy = moved_policy(kind)
    batch = make_batch("ddpo", policy)
    log_prob = one_by_one(policy, batch, "current")["log_prob"]
    output = make("ddpo", estimator=estimator).loss(policy, batch, KEY)
    if estimator == "score_function":
        loss = ddpo_sf_loss(log_prob, batch.advantages)
    else:
        loss = ppo_clip_loss(log_prob, batch.old_log_prob, batch.advantages, clip_range=0.02)
        assert 0 < float(output.metrics["train/clip_fraction"][0]) < len(batch), "the clip must act on some"
    check(policy, output, (batch.weight * loss).mean())


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("kl", ["eps_mse", "gaussian"])
def test_dpok(kl: str, kind: str) -> None:
    policy = moved_policy(kind)
    batch = make_batch("dpok", policy)
    current, reference = (one_by_one(policy, batch, version) for version in ("current", "reference"))
    loss = 3.0 * dpok_policy_loss(current["log_prob"], batch.old_log_prob, batch.advantages, clip_range=0.02)
    if kl == "gaussian":
        distance = dpok_kl(current["mean"], reference["mean"].detach(), kind="gaussian", std=current["std"])
    else:
        distance = dpok_kl(current["eps"], reference["eps"].detach())
    output = make("dpok", kl=kl).loss(policy, batch, KEY)
    check(policy, output, (batch.weight * (loss + 0.5 * distance)).mean())


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(("name", "function"), [("d3po", d3po_loss), ("spo", spo_loss)])
def test_pairs_of_transitions(name: str, function: Callable[..., Tensor], kind: str) -> None:
    policy = moved_policy(kind)
    batch = make_batch(name, policy)
    four = [
        one_by_one(policy, batch, version, side)["log_prob"]
        for version in ("current", "reference")
        for side in ("winner_", "loser_")
    ]
    output = make(name).loss(policy, batch, KEY)
    check(policy, output, (batch.weight * function(*four, beta=2.0, clip_range=0.05)).mean())


@pytest.mark.parametrize("kind", PATHS)
def test_prdp_sums_over_the_steps_of_a_pair(kind: str) -> None:
    policy = moved_policy(kind)
    batch = make_batch("prdp", policy)
    sides = [
        one_by_one(policy, batch, version, side)["log_prob"]
        for version in ("current", "reference")
        for side in ("winner_", "loser_")
    ]
    old = [batch.winner_old_log_prob, batch.loser_old_log_prob]
    by_step = [torch.stack([rows[step::STEPS] for step in range(STEPS)]) for rows in [*sides, *old]]
    rewards = [rows[::STEPS] for rows in (batch.winner_reward, batch.loser_reward)]
    loss = prdp_loss(*by_step, *rewards, beta=2.0, clip_range=0.02)
    output = make("prdp").loss(policy, batch, KEY)
    assert len(loss) == IMAGES
    check(policy, output, (batch.weight[::STEPS] * loss).mean())


@pytest.mark.parametrize("ratio", ["plain", "guard"])
@pytest.mark.parametrize("kl", ["flow_grpo", "exact"])
@pytest.mark.parametrize("sde", ["flow_grpo", "dance"])
def test_flow_grpo(sde: str, kl: str, ratio: str) -> None:
    policy = moved_policy("flow")
    batch = make_batch("flow_grpo", policy, SAMPLERS["flow"].model_copy(update={"sde": sde}))
    current, reference = (
        one_by_one(policy, batch, version, is_negative_fixed=True) for version in ("current", "reference")
    )
    steps, std = sigmas(policy, batch), current["std"]
    if ratio == "plain":
        loss = ppo_clip_loss(current["log_prob"], batch.old_log_prob, batch.advantages, clip_range=0.02)
    else:
        rho = guard_ratio(current["log_prob"], batch.old_log_prob, current["mean"], batch.old_mean, std)
        loss = guard_loss(rho, batch.advantages, **steps, clip_range=0.02)
    means = current["mean"], reference["mean"].detach()
    distance = gaussian_kl(*means, std) if kl == "exact" else flow_grpo_kl(*means, std, **steps)
    output = make("flow_grpo", kl=kl, ratio=ratio).loss(policy, batch, KEY)
    check(policy, output, (batch.weight * (loss + 0.5 * distance)).mean())


# ---- identities of the classes -----------------------------------------------------------------------------


def as_drawn(policy: ToyPolicy, guidance: float = 2.0) -> TrajectoryBatch:
    """One step of all images in the very batch that drew it, so that nothing is rounded differently."""
    from tests.unit.algorithms.trajectories import Drawn

    drawn = Drawn(policy, SAMPLERS[policy.path.kind].model_copy(update={"guidance": guidance}))
    kept, rows = drawn.trajectory, 2 * IMAGES
    return TrajectoryBatch(
        kept.latents[1], kept.latents[2], torch.full((rows,), 1), kept.mean_log_probs[1],
        torch.randn(rows, generator=torch.Generator().manual_seed(4)), drawn.conditioning,
        tuple(map(str, range(rows))), drawn.sampler, drawn.negative, old_mean=kept.means[1],
    )  # fmt: skip


@pytest.mark.parametrize("kind", PATHS)
def test_on_the_first_pass_the_ratio_is_1_and_both_estimators_have_one_gradient(kind: str) -> None:
    policy = moved_policy(kind, moved=False)
    batch = as_drawn(policy)
    outputs = {
        estimator: make("ddpo", estimator=estimator).loss(policy, batch, KEY)
        for estimator in ("score_function", "importance_sampling")
    }
    found = [gradients(policy, output.loss) for output in outputs.values()]
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])
    for output in (*outputs.values(), make("dpok").loss(policy, batch, KEY)):
        assert float(output.metrics["train/ratio"][0]) == len(batch)
        assert float(output.metrics["train/clip_fraction"][0]) == 0
    if kind == "flow":
        guard = make("flow_grpo", ratio="guard").loss(policy, batch, KEY)
        assert float(guard.metrics["train/ratio"][0]) == len(batch)


@pytest.mark.parametrize("kind", PATHS)
def test_flow_grpo_without_kl_and_guidance_is_ddpo_bit_for_bit(kind: str) -> None:
    policy = moved_policy(kind)
    batch = as_drawn(policy, guidance=1.0)
    outputs = [
        make(name, **changes).loss(policy, batch, KEY)
        for name, changes in (("ddpo", {}), ("flow_grpo", {"kl_weight": 0.0, "kl": "exact"}))
    ]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    one, other = (gradients(policy, output.loss) for output in outputs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_spo_is_d3po_on_other_pairs_bit_for_bit() -> None:
    policy = moved_policy("vp")
    batch = make_batch("spo", policy)
    outputs = [make(name).loss(policy, batch, KEY) for name in ("spo", "d3po")]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    one, other = (gradients(policy, output.loss) for output in outputs)
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- what is missing ---------------------------------------------------------------------------------------


def test_a_batch_that_lacks_what_a_method_reads_is_refused_with_its_name() -> None:
    policy = moved_policy("flow")
    batch = make_batch("flow_grpo", policy)
    with pytest.raises(DataError, match="ratio guard: the batch has no old_mean"):
        make("flow_grpo", ratio="guard").loss(policy, replace(batch, old_mean=None), KEY)
    pairs = make_batch("prdp", policy)
    with pytest.raises(DataError, match="prdp: the batch has no groups"):
        make("prdp").loss(policy, replace(pairs, groups=None), KEY)
    with pytest.raises(DataError, match="prdp: pairs of 1 to 3 steps"):
        make("prdp").loss(policy, replace(pairs, groups=torch.tensor([9, *pairs.groups.tolist()[1:]])), KEY)


def test_flow_grpo_gives_its_negative_branch_no_gradient_and_ddpo_does() -> None:
    policy = moved_policy("flow")
    batch = make_batch("flow_grpo", policy)
    shares = []
    for name in ("ddpo", "flow_grpo"):
        text = batch.negative_conditioning.tensors["text"].clone().requires_grad_()
        changed = replace(batch, negative_conditioning=Conditioning({"text": text}))
        make(name, **({"kl_weight": 0.0} if name == "flow_grpo" else {})).loss(
            policy, changed, KEY
        ).loss.backward()
        shares.append(0.0 if text.grad is None else float(text.grad.abs().max()))
    assert shares[0] > 0 and shares[1] == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_clips_act_on_some_rows_of_these_batches(name: str) -> None:
    policy = moved_policy("flow")
    metrics = make(name).loss(policy, make_batch(name, policy), KEY).metrics
    if name == "spo":  # has no such metric
        return
    fraction = metrics.get("train/clip_fraction", metrics.get("train/clip_fraction_high"))
    assert 0 < float(fraction[0]) / fraction[1] < 1
