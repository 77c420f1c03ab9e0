"""The classes of the methods on pairs and on images feed their pure functions, with what they say they need.

In float64: both sides are the same formula on eight rows, summed in another order and by other calls, so that
they agree to some hundreds of roundings of 1e-16 of the largest term.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import (
    auto_beta,
    awm_loss,
    dgpo_loss,
    diffusion_dpo_loss,
    diffusion_kto_loss,
    kto_baseline,
    mapo_loss,
    nft_loss,
    nft_optimality,
    old_policy_decay,
    orpo_loss,
    pair_margin,
    rwr_weights,
    safeguard_scale,
    spin_loss,
)
from diffexpo.algorithms.pairs import measure_errors
from diffexpo.config.methods.dgpo import DgpoConfig
from diffexpo.diffusion import NoiseDraw, empty_prompt_mask, prediction_errors
from diffexpo.errors import ConfigError, DataError, PolicyError
from diffexpo.policies.toy import ToyPolicy
from diffexpo.types import Conditioning, FollowsSteps, LossOutput, PairBatch, ScoredBatch
from tests.unit.algorithms.methods import (
    KEY,
    ON_IMAGES,
    ON_PAIRS,
    PATHS,
    ROWS,
    SETTINGS,
    gradients,
    make,
    make_batch,
    make_policy,
    settings_of,
)

pytestmark = pytest.mark.usefixtures("float64")
# Some hundreds of roundings of 1e-16, of terms up to 30 (beta) times as large as what is compared.
BOUND = 1e-11


def means(output: LossOutput) -> dict[str, float]:
    return {name: float(total) / count for name, (total, count) in output.metrics.items()}


def prompts_of(policy: ToyPolicy, conditioning: Conditioning, names: list[str]) -> Conditioning:
    """Every row that the key chooses has the empty prompt."""
    mask = empty_prompt_mask(names, KEY, 0.5)
    empty = policy.encode_prompts([""]).tensors["text"]
    return Conditioning({"text": torch.where(mask[:, None], empty, conditioning.tensors["text"])})


def noise_names(name: str, batch: PairBatch | ScoredBatch) -> list[str]:
    """Images of a group share their noise under DGPO alone."""
    return [f"group {group}" for group in batch.groups.tolist()] if name == "dgpo" else list(batch.keys)


def error_of(policy: ToyPolicy, name: str, batch: ScoredBatch, version: str) -> Tensor:
    names = noise_names(name, batch)
    draw = NoiseDraw.keyed(names, KEY, policy.path, batch.latents.shape[1:])
    with policy.weights.use(version):
        return prediction_errors(
            policy, batch.latents, draw.eps, draw.t, prompts_of(policy, batch.conditioning, names)
        )


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", ["sft", "rwr", "diffusion_kto", "dgpo"])
def test_methods_on_errors_feed_their_pure_function(name: str, kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch(name, policy)
    error, reference, old = (
        error_of(policy, name, batch, version) for version in ("current", "reference", "old")
    )
    if name in ("sft", "rwr"):
        expected = batch.weight * error
    elif name == "diffusion_kto":
        baseline = kto_baseline(error, reference, batch.desirable)
        expected = diffusion_kto_loss(error, reference, batch.desirable, beta=30.0, baseline=baseline)
    else:
        expected = dgpo_loss(
            error, reference, batch.advantages, batch.groups, beta=30.0, error_old=old, clip_range=0.1
        )
    output = make(name, policy).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=BOUND, atol=BOUND)
    assert means(output)["train/loss"] == pytest.approx(float(output.loss.detach()), rel=BOUND)
    assert_close(gradients(policy, output.loss), gradients(policy, expected.mean()))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Slopes, beside the largest of them."""
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=0, atol=BOUND * largest)


def predictions(
    policy: ToyPolicy, name: str, batch: ScoredBatch
) -> tuple[dict[str, Tensor], Tensor, NoiseDraw]:
    """Every version's prediction, x_t and the draw, by the path's own formulas."""
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, batch.latents.shape[1:])
    alpha, sigma = (scale[:, None, None, None] for scale in policy.path.alpha_sigma(draw.t.double()))
    x_t = alpha * batch.latents + sigma * draw.eps
    found = {}
    for version in ("current", "old", "reference"):
        with policy.weights.use(version):
            found[version] = policy.predict(
                x_t, draw.t, prompts_of(policy, batch.conditioning, list(batch.keys))
            )
    return found, x_t, draw


@pytest.mark.parametrize("kind", PATHS)
def test_nft_is_five_times_the_loss_in_x0_and_the_kl(kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch("diffusion_nft", policy)
    found, x_t, draw = predictions(policy, "diffusion_nft", batch)
    r = nft_optimality(batch.advantages)
    if kind == "flow":
        loss = nft_loss(found["current"], found["old"], batch.latents, x_t, draw.t, r, beta=0.5)
    else:
        # The formula with x0+- = x0_old +- beta (x0 - x0_old), which a velocity's x_t - t v+- is too.
        x0 = {key: policy.path.x0_eps(value, x_t, draw.t.double())[0] for key, value in found.items()}
        step = 0.5 * (x0["current"] - x0["old"].detach())
        sides = []
        for estimate in (x0["old"].detach() + step, x0["old"].detach() - step):
            difference = (estimate - batch.latents).flatten(1)
            norm = difference.detach().abs().mean(dim=1).clamp(min=1e-5)
            sides.append(difference.square().mean(dim=1) / norm)
        loss = (r * sides[0] + (1 - r) * sides[1]) / 0.5
    kl = (found["current"] - found["reference"]).square().flatten(1).mean(dim=1)
    output = make("diffusion_nft", policy).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, (5 * loss + 0.5 * kl).mean(), rtol=BOUND, atol=BOUND)
    shown = means(output)
    assert shown["train/reference_distance"] == pytest.approx(float(kl.detach().mean()), rel=BOUND)
    assert shown["train/optimality"] == pytest.approx(float(r.mean()), rel=BOUND)
    assert shown["train/old_distance"] > 0


@pytest.mark.parametrize("kind", PATHS)
def test_awm_is_the_clipped_ratio_and_the_kl(kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch("awm", policy)
    found, _, draw = predictions(policy, "awm", batch)
    error, old = (error_of(policy, "awm", batch, version) for version in ("current", "old"))
    shape = {"weighting": "ghuber", "power": 0.25}
    loss = awm_loss(error, old, batch.advantages, draw.t, clip_range=0.1, **shape)
    kl = (found["current"] - found["reference"]).square().flatten(1).mean(dim=1)
    output = make("awm", policy).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, (loss + 0.5 * kl).mean(), rtol=BOUND, atol=BOUND)
    clipped = means(output)["train/clip_fraction"]
    held = torch.autograd.grad(loss.sum(), error, retain_graph=True)[0] == 0
    assert clipped == pytest.approx(float(held.double().mean()), rel=BOUND)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", ON_PAIRS)
def test_methods_on_pairs_feed_their_pure_function(name: str, kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch(name, policy)
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, batch.winner.shape[1:])
    errors = measure_errors(
        policy, batch.winner, batch.loser, draw, prompts_of(policy, batch.conditioning, list(batch.keys))
    )
    four = (errors.winner, errors.loser, errors.winner_ref, errors.loser_ref)
    expected = {
        "diffusion_dpo": lambda: diffusion_dpo_loss(*four, beta=30.0),
        "python": lambda: diffusion_dpo_loss(*four, beta=30.0),  # as tests/own_losses.py writes it
        "spin": lambda: spin_loss(*four, beta=30.0),
        "mapo": lambda: mapo_loss(*four[:2], beta=0.1, num_train_timesteps=30),
        "orpo": lambda: orpo_loss(*four[:2], beta=3.0, weight=2.0),
    }[name]()
    output = make(name, policy).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, (batch.weight * expected).mean(), rtol=BOUND, atol=BOUND)
    assert ("train/winner_reference_error" in output.metrics) is (name not in ("mapo", "orpo"))


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_starts_where_it_says_and_runs_only_what_it_says(name: str, kind: str) -> None:
    policy = make_policy(kind, moved=False)
    batch = replace(make_batch(name, policy), weight=None if name != "rwr" else torch.ones(ROWS))
    algorithm = make(name, policy)
    used = set()
    inner = policy.weights.use
    policy.weights.use = lambda version: used.add(version) or inner(version)
    output = algorithm.loss(policy, batch, KEY)
    needed = {"current"}
    needed |= {"reference"} if algorithm.settings.needs_reference else set()
    needed |= {"old"} if algorithm.settings.needs_old_policy else set()
    needed |= {algorithm.settings.anchor_version} - {None}
    assert used == needed
    if algorithm.settings.initial_loss is not None:
        assert float(output.loss.detach()) == pytest.approx(algorithm.settings.initial_loss, abs=BOUND)
    assert not any(total.requires_grad for total, _ in output.metrics.values())


def test_dgpo_margin_accuracy_and_names() -> None:
    policy = make_policy()
    batch = make_batch("dgpo", policy)
    output = make("dgpo", policy, clip_range=None).loss(policy, batch, KEY)
    margin = means(output)["train/margin"]
    error, reference = (error_of(policy, "dgpo", batch, version) for version in ("current", "reference"))
    gap = (batch.advantages * (error - reference)).reshape(2, 4).mean(dim=1)
    assert margin == pytest.approx(float((-30.0 * gap).detach().mean()), rel=BOUND)
    assert means(output)["train/implicit_accuracy"] == float((gap < 0).float().mean())
    with pytest.raises(DataError, match="is_grouped is False.*whole group"):
        make("dgpo", policy).loss(policy, replace(batch, is_grouped=False), KEY)


def test_kto_labels_decide_what_counts_as_right() -> None:
    policy = make_policy()
    batch = make_batch("diffusion_kto", policy)
    algorithm = make("diffusion_kto", policy)
    shown = means(algorithm.loss(policy, replace(batch, measured=0.0), KEY))
    flipped = means(algorithm.loss(policy, replace(batch, measured=0.0, desirable=~batch.desirable), KEY))
    assert shown["train/implicit_accuracy"] == pytest.approx(
        1 - flipped["train/implicit_accuracy"], abs=BOUND
    )
    assert shown["train/implicit_reward_desirable"] == flipped["train/implicit_reward_undesirable"]
    one_class = algorithm.loss(policy, replace(batch, desirable=torch.ones(ROWS, dtype=torch.bool)), KEY)
    # The engine leaves out what is of no row (tests/unit/training/test_engine.py).
    assert one_class.metrics["train/implicit_reward_undesirable"] == (0.0, 0.0)
    assert one_class.metrics["train/implicit_reward_desirable"][1] == ROWS


@pytest.mark.parametrize("kind", ["mean", "class_mean"])
@pytest.mark.parametrize("flip", [False, True])
def test_kto_measures_the_baseline_of_the_whole_batch(kind: str, flip: bool) -> None:
    policy = make_policy()
    if flip:  # otherwise the policy is the better one, and the clamp acts for one of the two
        current, reference = policy.weights.state("current"), policy.weights.state("reference")
        policy.weights.load("current", reference)
        policy.weights.load("reference", current)
    batch = make_batch("diffusion_kto", policy)
    algorithm = make("diffusion_kto", policy, baseline=kind)
    parts = [batch_rows(batch, slice(0, 3)), batch_rows(batch, slice(3, ROWS))]
    sums = sum(algorithm.measure(policy, part, KEY) for part in parts)
    error, reference = (
        error_of(policy, "diffusion_kto", batch, version) for version in ("current", "reference")
    )
    expected = float(kto_baseline(error, reference, batch.desirable, kind=kind))
    measured = algorithm.with_measured(batch, sums)
    assert measured.measured == pytest.approx(expected, rel=BOUND, abs=BOUND)
    torch.testing.assert_close(
        algorithm.loss(policy, measured, KEY).loss,
        algorithm.loss(policy, batch, KEY).loss,
        rtol=BOUND,
        atol=BOUND,
    )


def batch_rows(batch: ScoredBatch, rows: slice) -> ScoredBatch:
    from diffexpo.training.batches import split_batch

    return split_batch(batch, rows.start, rows.stop)


def test_rwr_weighs_a_prompts_images_and_refuses_rows_without() -> None:
    policy = make_policy()
    rewards = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64)
    algorithm = make("rwr", policy)
    assert torch.equal(algorithm.weigh(rewards), rwr_weights(rewards, temperature=0.5))
    sparse = make("rwr", policy, kind="sparse", percentile=90.0)
    assert torch.equal(sparse.weigh(rewards), torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64))
    batch = make_batch("rwr", policy)
    shown = means(algorithm.loss(policy, batch, KEY))
    assert shown["train/squared_weight"] == pytest.approx(float(batch.weight.square().mean()), rel=BOUND)
    with pytest.raises(DataError, match="has no weights"):
        algorithm.loss(policy, replace(batch, weight=None), KEY)


@pytest.mark.parametrize("decay", [0, 1, 2])
def test_the_old_policy_follows_as_scheduled(decay: int) -> None:
    policy = make_policy()
    algorithm = make("diffusion_nft", policy, old_decay=decay)
    assert isinstance(algorithm, FollowsSteps)
    old, current = policy.weights.state("old"), policy.weights.state("current")
    algorithm.after_step(policy, 200)
    share = old_policy_decay(200, kind=decay)
    for name, value in policy.weights.state("old").items():
        torch.testing.assert_close(value, share * old[name] + (1 - share) * current[name], rtol=0, atol=BOUND)
    assert policy.weights.fingerprint("current") != policy.weights.fingerprint("old") or decay == 0


def test_the_old_policy_is_held_for_an_iteration_by_default() -> None:
    policy = make_policy()
    before = policy.weights.fingerprint("old")
    make("diffusion_nft", policy).after_step(policy, 200)
    assert policy.weights.fingerprint("old") == before


@pytest.mark.parametrize("name", ["diffusion_nft", "awm", "dgpo"])
def test_an_old_policy_that_was_never_set_is_missed(name: str) -> None:
    policy = ToyPolicy(PATHS["vp"])
    with pytest.raises(PolicyError, match="old"):
        make(name, policy).loss(policy, make_batch(name, policy), KEY)


@pytest.mark.parametrize("name", ON_IMAGES + ("spin", "mapo", "orpo"))
def test_empty_prompts_need_a_conditioning(name: str) -> None:
    from diffexpo.algorithms import algorithm_class

    with pytest.raises(ConfigError, match="empty_prompt_fraction is 0.5, but no conditioning"):
        algorithm_class(name)(settings_of(name))


def test_a_clip_makes_dgpo_need_an_old_policy() -> None:
    policy = make_policy()
    assert make("dgpo", policy).settings.needs_old_policy
    assert not make("dgpo", policy, clip_range=None).settings.needs_old_policy
    assert DgpoConfig().clip_range is None


# ---- options of Diffusion-DPO --------------------------------------------------------------------------------


def dpo_parts(policy: ToyPolicy, batch: PairBatch) -> tuple[tuple[Tensor, ...], NoiseDraw, Conditioning]:
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, batch.winner.shape[1:])
    conditioning = prompts_of(policy, batch.conditioning, list(batch.keys))
    errors = measure_errors(policy, batch.winner, batch.loser, draw, conditioning)
    return (errors.winner, errors.loser, errors.winner_ref, errors.loser_ref), draw, conditioning


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_the_safeguard_scales_the_losers_gradient_and_nothing_else(kind: str, mu: float) -> None:
    policy = make_policy(kind)
    batch = make_batch("diffusion_dpo", policy)
    plain = make("diffusion_dpo", policy).loss(policy, batch, KEY)
    guarded = make("diffusion_dpo", policy, safeguard=True, safeguard_mu=mu).loss(policy, batch, KEY)
    assert torch.equal(plain.loss, guarded.loss)

    four, draw, conditioning = dpo_parts(policy, batch)
    alpha, sigma = (scale[:, None, None, None] for scale in policy.path.alpha_sigma(draw.t.double()))
    differences = []
    for x0 in (batch.winner, batch.loser):
        with torch.no_grad():
            prediction = policy.predict(alpha * x0 + sigma * draw.eps, draw.t, conditioning)
        differences.append(prediction - policy.path.target(x0, draw.eps, draw.t.double()))
    scale = safeguard_scale(*differences, mu=mu)
    assert 0 < int((scale < 1).sum()) and means(guarded)["train/loser_gradient_scale"] == pytest.approx(
        float(scale.mean()), rel=BOUND
    )
    slopes = torch.autograd.grad(
        (batch.weight * diffusion_dpo_loss(*four, beta=30.0)).mean(), four[:2], retain_graph=True
    )
    expected = gradients(policy, (slopes[0] * four[0] + slopes[1] * scale * four[1]).sum())
    assert_close(gradients(policy, guarded.loss), expected)


def test_auto_beta_is_that_of_the_whole_batch_and_at_most_beta() -> None:
    policy = make_policy()
    batch = make_batch("diffusion_dpo", policy)
    algorithm = make("diffusion_dpo", policy, beta=5000.0, auto_beta=True)
    four, _, _ = dpo_parts(policy, batch)
    expected = float(auto_beta(pair_margin(*four, beta=1.0), target=0.2, maximum=5000.0))
    assert expected < 5000
    from diffexpo.training.batches import split_batch

    parts = [split_batch(batch, 0, 3), split_batch(batch, 3, ROWS)]
    sums = sum(algorithm.measure(policy, part, KEY) for part in parts)
    measured = algorithm.with_measured(batch, sums)
    assert measured.measured == pytest.approx(expected, rel=BOUND)
    output = algorithm.loss(policy, parts[0], KEY)
    assert means(output)["train/beta"] != pytest.approx(expected, rel=1e-3)
    output = algorithm.loss(policy, split_batch(measured, 0, 3), KEY)
    assert means(output)["train/beta"] == pytest.approx(expected, rel=BOUND)
    start = make_policy(moved=False)
    assert means(make("diffusion_dpo", start, beta=77.0, auto_beta=True).loss(start, batch, KEY))[
        "train/beta"
    ] == pytest.approx(77.0)
    assert algorithm.with_measured(batch, torch.tensor([float("nan"), 8.0])).measured == 5000.0
