"""The algorithm classes on a small real policy, and what losses refuse.

In float64: what is compared is the same formula on six rows in another order of sums, some hundreds of
roundings of 1e-16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import (
    DiffusionDpo,
    Expo,
    algorithm_class,
    diffusion_dpo_loss,
    exploration_bonus,
    expo_loss,
    simpo_loss,
)
from diffexpo.algorithms.pairs import measure_errors, predict_pairs
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.diffusion import NoiseDraw, Path, empty_prompt_mask
from diffexpo.errors import ConfigError, DataError
from diffexpo.policies.toy import TOY_FULL, TOY_LORA, ToyPolicy
from diffexpo.types import PairBatch
from tests.unit.diffusion.toys import ABAR

pytestmark = pytest.mark.usefixtures("float64")
BOUND = 1e-12
KEY = (0, 1, "noise", 3)
PATHS = {"vp": Path.vp(ABAR), "flow": Path.flow(3.0)}
LN2 = 0.6931471805599453


def settings(**values: object) -> ExpoConfig:
    return ExpoConfig(**{"beta": 30.0, "empty_prompt_fraction": 0.0} | values)


def world(kind: str = "vp", tuning: object = TOY_LORA, *, moved: bool = True) -> tuple[ToyPolicy, PairBatch]:
    """A policy (away from its reference if `moved`) and six pairs with three contrast pairs."""
    policy = ToyPolicy(PATHS[kind], tuning=tuning)
    generator = torch.Generator().manual_seed(0)
    if moved:
        with torch.no_grad():
            for parameter in policy.weights.trainable().values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    latents = [torch.randn(6, 2, 1, 1, generator=generator) for _ in range(4)]
    prompts = [f"prompt {row}" for row in range(6)]
    batch = PairBatch(
        winner=latents[0],
        loser=latents[1],
        conditioning=policy.encode_prompts(prompts),
        keys=tuple(f"pair {row}" for row in range(6)),
        explored=latents[2][:3],
        main=latents[3][:3],
        contrast_conditioning=policy.encode_prompts(prompts[:3]),
        contrast_keys=("c0", "c1", "c2"),
    )
    return policy, batch


def gradients(policy: ToyPolicy, loss: Tensor) -> dict[str, Tensor]:
    trainable = policy.weights.trainable()
    values = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    return {name: value for name, value in zip(trainable, values, strict=True) if value is not None}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("tuning", [TOY_FULL, TOY_LORA])
def test_step_0(kind: str, tuning: object) -> None:
    policy, batch = world(kind, tuning, moved=False)
    dpo = DiffusionDpo(settings()).loss(policy, batch, KEY)
    assert float(dpo.loss.detach()) == pytest.approx(LN2, abs=BOUND)
    expo = Expo(settings(alpha=0.5)).loss(policy, batch, KEY)
    assert float(expo.loss.detach()) == pytest.approx(LN2 + 0.25, abs=BOUND)
    for name, expected in {
        "implicit_accuracy": 0.5,
        "margin": 0.0,
        "bonus": 0.5,
        "bonus_margin": 0.0,
    }.items():
        total, count = expo.metrics[f"train/{name}"]
        assert float(total) / count == expected, name


@pytest.mark.parametrize("kind", PATHS)
def test_expo_without_alpha_is_diffusion_dpo_bit_for_bit(kind: str) -> None:
    policy, batch = world(kind)
    calls = []
    inner = policy.predict
    policy.predict = lambda *args: calls.append(len(args[0])) or inner(*args)
    before = torch.get_rng_state()
    outputs = [cls(settings()).loss(policy, batch, KEY) for cls in (Expo, DiffusionDpo)]
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == [12, 12] * 2, "one forward of policy and one of reference on [winner; loser], each"
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    one, other = (gradients(policy, output.loss) for output in outputs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert outputs[0].metrics.keys() == outputs[1].metrics.keys()
    without = replace(batch, explored=None, main=None, contrast_conditioning=None, contrast_keys=())
    assert torch.equal(Expo(settings(alpha=0.7)).loss(policy, without, KEY).loss, outputs[1].loss)


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.2, 0.6)])
@pytest.mark.parametrize("kind", PATHS)
def test_the_class_feeds_the_pure_function(kind: str, times: tuple[float, float]) -> None:
    policy, batch = world(kind)
    output = Expo(settings(alpha=0.7, beta_explore=12.0, timestep_range=times)).loss(policy, batch, KEY)
    shape = batch.winner.shape[1:]
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, shape, times)
    contrast = NoiseDraw.keyed(batch.contrast_keys, (*KEY, "contrast"), policy.path, shape, times)
    pairs = measure_errors(policy, batch.winner, batch.loser, draw, batch.conditioning)
    couples = measure_errors(policy, batch.explored, batch.main, contrast, batch.contrast_conditioning)
    eight = [*pairs.four, *couples.four]
    expected = expo_loss(*eight, beta=30.0, alpha=0.7, beta_explore=12.0)
    assert torch.equal(output.loss, expected)
    assert not any(errors.requires_grad for errors in (pairs.winner_ref, couples.loser_ref))
    means = {name: float(total) / count for name, (total, count) in output.metrics.items()}
    assert means["train/winner_error"] == pytest.approx(float(pairs.winner.detach().mean()), rel=BOUND)
    assert means["train/loser_reference_error"] == pytest.approx(float(pairs.loser_ref.mean()), rel=BOUND)
    gap = means["train/implicit_reward_winner"] - means["train/implicit_reward_loser"]
    assert means["train/margin"] == pytest.approx(gap, rel=BOUND, abs=30 * BOUND)
    assert means["train/loss"] == pytest.approx(float(output.loss.detach()), rel=BOUND)
    bonus = exploration_bonus(*eight[4:], beta=12.0)
    assert means["train/bonus"] == pytest.approx(float(bonus.detach().mean()), rel=BOUND)
    assert not any(total.requires_grad for total, _ in output.metrics.values())


@pytest.mark.parametrize("kind", PATHS)
def test_a_step_down_the_loss_moves_the_margin_and_the_bonus_moves_towards_exploration(kind: str) -> None:
    policy, batch = world(kind, TOY_FULL, moved=False)
    algorithm = Expo(settings(alpha=1.0))
    trainable = policy.weights.trainable()

    def state() -> tuple[Tensor, Tensor, float, float]:
        per_pair, metrics = algorithm.pair_losses(policy, batch, KEY)
        bonus, more = algorithm._bonus(
            predict_pairs(policy, algorithm._contrast(policy, batch, KEY)).errors()
        )
        margin, lead = metrics["train/margin"], more["train/bonus_margin"]
        return per_pair.mean(), bonus.mean(), float(margin[0]), float(lead[0])

    reference = policy.weights.fingerprint("reference")
    start = {name: value.detach().clone() for name, value in trainable.items()}
    for which in (0, 1):
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(start[name])
        terms = state()
        with torch.no_grad():
            for name, slope in gradients(policy, terms[which]).items():
                trainable[name].sub_(1e-4 * slope)
        assert state()[2 + which] > terms[2 + which] == 0.0
    assert policy.weights.fingerprint("reference") == reference


def test_a_batch_may_be_split() -> None:
    policy, batch = world(tuning=TOY_FULL)  # adapters are float32 whatever the network is
    algorithm = DiffusionDpo(settings(empty_prompt_fraction=0.5), policy.encode_prompts([""]))
    whole, _ = algorithm.pair_losses(policy, batch, KEY)
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = PairBatch(
            batch.winner[rows], batch.loser[rows], batch.conditioning.select(rows), batch.keys[rows]
        )
        parts.append(algorithm.pair_losses(policy, part, KEY)[0])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=BOUND, atol=BOUND)


def test_empty_prompts_replace_keyed_rows_for_policy_and_reference() -> None:
    policy, batch = world()
    empty = policy.encode_prompts([""])
    mask = empty_prompt_mask(batch.keys, KEY, 0.5)
    assert 0 < int(mask.sum()) < 6
    seen = []
    inner = policy.predict
    policy.predict = lambda x, t, c: seen.append(c.tensors["text"]) or inner(x, t, c)
    DiffusionDpo(settings(empty_prompt_fraction=0.5), empty).loss(policy, batch, KEY)
    expected = torch.where(mask[:, None], empty.tensors["text"], batch.conditioning.tensors["text"])
    assert len(seen) == 2
    for rows in seen:
        assert torch.equal(rows, torch.cat([expected, expected]))
    with pytest.raises(ConfigError, match="empty_prompt_fraction is 0.5, but no conditioning"):
        DiffusionDpo(settings(empty_prompt_fraction=0.5))


def test_uncertainty_offsets_have_their_signs() -> None:
    policy, batch = world(moved=False)
    surer_loser = replace(
        batch, uncertainty_winner=torch.full((6,), 0.9), uncertainty_loser=torch.full((6,), 0.4)
    )
    values = {}
    for mode in ("off", "optimism", "pessimism"):
        algorithm = DiffusionDpo(settings(uncertainty=mode, uncertainty_scale=2.0))
        values[mode] = algorithm.pair_losses(policy, surer_loser, KEY)[0].detach()
        # Offline pairs have no uncertainty and no offset.
        plain = algorithm.pair_losses(policy, batch, KEY)[0].detach()
        torch.testing.assert_close(plain, torch.full((6,), LN2))
    # At h = 0, Gamma_w - Gamma_l = 0.5 and scale 2: the logit is -1 (optimism asks for more) or +1.
    softplus = torch.nn.functional.softplus
    torch.testing.assert_close(values["off"], torch.full((6,), LN2))
    torch.testing.assert_close(values["optimism"], softplus(torch.full((6,), 1.0)))
    torch.testing.assert_close(values["pessimism"], softplus(torch.full((6,), -1.0)))


def test_weights_and_anchor() -> None:
    policy, batch = world()
    plain, _ = DiffusionDpo(settings()).pair_losses(policy, batch, KEY)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.0])
    weighted, _ = DiffusionDpo(settings()).pair_losses(policy, replace(batch, weight=weight), KEY)
    torch.testing.assert_close(weighted, weight * plain)
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, batch.winner.shape[1:])
    winner = measure_errors(policy, batch.winner, batch.loser, draw, batch.conditioning).winner
    anchored, _ = DiffusionDpo(settings(sft_weight=0.3)).pair_losses(policy, batch, KEY)
    torch.testing.assert_close(anchored, plain + 0.3 * winner)


def test_simpo_never_runs_the_reference() -> None:
    policy, batch = world()
    used = []
    inner = policy.weights.use
    policy.weights.use = lambda name: used.append(name) or inner(name)
    algorithm = DiffusionDpo(settings(kind="simpo", simpo_gamma=0.4))
    assert not algorithm.settings.needs_reference
    output = algorithm.loss(policy, batch, KEY)
    assert used == ["current"]
    assert "train/winner_reference_error" not in output.metrics
    assert settings(kind="simpo", alpha=0.1).needs_reference


def test_beta_explore_settings() -> None:
    assert settings(beta=5000.0).bonus_beta == 5000.0
    assert settings(beta=5000.0, beta_explore="literal").bonus_beta == 5.0
    assert settings(beta=5000.0, beta_explore=70.0).bonus_beta == 70.0
    assert (algorithm_class("expo"), algorithm_class("diffusion_dpo")) == (Expo, DiffusionDpo)


def test_contrast_pairs_must_be_whole() -> None:
    policy, batch = world()
    with pytest.raises(DataError, match="3 contrast pairs but lacks explored, main or contrast_conditioning"):
        Expo(settings(alpha=0.5)).loss(policy, replace(batch, main=None), KEY)


def test_refusals() -> None:
    e = torch.ones(2)
    four = (e, e, e, e)
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="diffusion_dpo_loss: beta is"):
            diffusion_dpo_loss(*four, beta=beta)
        with pytest.raises(ValueError, match="exploration_bonus: beta is"):
            exploration_bonus(*four, beta=beta)
        with pytest.raises(ValueError, match="simpo_loss: beta is"):
            simpo_loss(e, e, beta=beta, gamma=0.0)
    with pytest.raises(
        ValueError, match="kind is 'simpo'; expected sigmoid, hinge, ipo, cdpo, robust or linear"
    ):
        diffusion_dpo_loss(*four, beta=1.0, kind="simpo")
    with pytest.raises(ValueError, match="label_smoothing is 0.5; expected 0 <= q < 0.5"):
        diffusion_dpo_loss(*four, beta=1.0, kind="cdpo", label_smoothing=0.5)
    with pytest.raises(ValueError, match="kind 'hinge' ignores it"):
        diffusion_dpo_loss(*four, beta=1.0, kind="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="alpha is -0.1; expected 0 or more"):
        expo_loss(*four, *four, beta=1.0, alpha=-0.1)
    with pytest.raises(ValueError, match="alpha is 0.1, but a contrast error is None"):
        expo_loss(*four, e, e, None, e, beta=1.0, alpha=0.1)
