"""Several draws of noise and time a pair, and the anchor to the base's prediction, against their formulas written out.

In float64, with the bound of `test_methods`: some hundreds of roundings of 1e-16, of terms up to 30 (beta) times as
large as what is compared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffexpo.algorithms import (
    auto_beta,
    diffusion_dpo_loss,
    expo_loss,
    mapo_loss,
    orpo_loss,
    pair_margin,
    safeguard_scale,
    spin_loss,
)
from diffexpo.algorithms.diffusion_dpo import DiffusionDpo
from diffexpo.algorithms.expo import Expo
from diffexpo.algorithms.pairs import held_rows
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.diffusion import NoiseDraw, Path, empty_prompt_mask, margin_signal, prediction_errors
from diffexpo.diffusion.objectives import NoisyImages
from diffexpo.errors import ConfigError
from diffexpo.policies.toy import TOY_FULL, ToyPolicy
from diffexpo.policies.weights import make_weights
from diffexpo.rng import torch_generator
from diffexpo.training.batches import split_batch
from diffexpo.types import Conditioning, PairBatch
from tests.unit.algorithms.methods import (
    KEY,
    ON_PAIRS,
    PATHS,
    gradients,
    make,
    make_batch,
    make_policy,
)

pytestmark = pytest.mark.usefixtures("float64")
BOUND = 1e-11
DRAWS = 3


def own_draw(policy: ToyPolicy, names: tuple[str, ...], key: tuple, number: int, draws: int) -> NoiseDraw:
    """Draw `number` of `draws` by the definition of its key: its own generator for each pair and draw."""
    eps, t = [], []
    for name in names:
        generator = torch_generator(*key, name, number)
        eps.append(torch.randn(policy.latent_shape, generator=generator))
        t.append(policy.path.training_t(1, generator, (number, draws)))
    return NoiseDraw(torch.stack(eps), torch.cat(t))


def prompts_of(policy: ToyPolicy, batch: PairBatch) -> Conditioning:
    mask = empty_prompt_mask(batch.keys, KEY, 0.5)
    empty = policy.encode_prompts([""]).tensors["text"]
    return Conditioning({"text": torch.where(mask[:, None], empty, batch.conditioning.tensors["text"])})


def mean_errors(
    policy: ToyPolicy,
    sides: tuple[Tensor, Tensor],
    names: tuple[str, ...],
    key: tuple,
    conditioning: Conditioning,
) -> list[Tensor]:
    """Winner, loser and their references: the means of DRAWS errors, each by a forward of its own."""
    found = []
    for version in ("current", "reference"):
        for side in sides:
            errors = []
            for number in range(DRAWS):
                draw = own_draw(policy, names, key, number, DRAWS)
                with policy.weights.use(version):
                    errors.append(prediction_errors(policy, side, draw.eps, draw.t, conditioning))
            found.append(sum(errors) / DRAWS)
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=0, atol=BOUND * largest)


# ---- draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", ON_PAIRS)
def test_errors_are_means_over_draws_before_the_loss(name: str, kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch(name, policy)
    four = mean_errors(policy, (batch.winner, batch.loser), batch.keys, KEY, prompts_of(policy, batch))
    expected = {
        "diffusion_dpo": lambda: diffusion_dpo_loss(*four, beta=30.0),
        "python": lambda: diffusion_dpo_loss(*four, beta=30.0),  # as tests/own_losses.py writes it
        "spin": lambda: spin_loss(*four, beta=30.0),
        "mapo": lambda: mapo_loss(*four[:2], beta=0.1, num_train_timesteps=30),
        "orpo": lambda: orpo_loss(*four[:2], beta=3.0, weight=2.0),
    }[name]()
    expected = (batch.weight * expected).mean()
    rows = []
    inner = policy.predict
    policy.predict = lambda *args: rows.append(len(args[0])) or inner(*args)
    algorithm = make(name, policy, draws=DRAWS)
    output = algorithm.loss(policy, batch, KEY)
    assert rows == [2 * DRAWS * len(batch)] * (2 if algorithm.settings.needs_reference else 1)
    torch.testing.assert_close(output.loss, expected, rtol=BOUND, atol=BOUND)
    close(gradients(policy, output.loss), gradients(policy, expected))


@pytest.mark.parametrize("kind", PATHS)
def test_the_bonus_of_expo_has_as_many_draws(kind: str) -> None:
    policy = make_policy(kind)
    pairs = make_batch("diffusion_dpo", policy)
    names = ("a", "b", "c")
    explored, main = pairs.loser[:3], pairs.winner[2:5]
    conditioning = pairs.conditioning.select(slice(0, 3))
    batch = replace(
        pairs,
        weight=None,
        explored=explored,
        main=main,
        contrast_conditioning=conditioning,
        contrast_keys=names,
    )
    four = mean_errors(policy, (pairs.winner, pairs.loser), pairs.keys, KEY, prompts_of(policy, pairs))
    contrast = mean_errors(policy, (explored, main), names, (*KEY, "contrast"), conditioning)
    expected = expo_loss(*four, *contrast, beta=30.0, alpha=0.7)
    settings = ExpoConfig(beta=30.0, alpha=0.7, draws=DRAWS, empty_prompt_fraction=0.5)
    output = Expo(settings, policy.encode_prompts([""])).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, expected, rtol=BOUND, atol=BOUND)
    close(gradients(policy, output.loss), gradients(policy, expected))


@pytest.mark.parametrize("kind", PATHS)
def test_the_safeguard_looks_at_all_draws_of_a_pair_together(kind: str) -> None:
    policy = make_policy(kind)
    batch = make_batch("diffusion_dpo", policy)
    conditioning = prompts_of(policy, batch)
    four = mean_errors(policy, (batch.winner, batch.loser), batch.keys, KEY, conditioning)
    differences = []
    for x0 in (batch.winner, batch.loser):
        parts = []
        for number in range(DRAWS):
            draw = own_draw(policy, batch.keys, KEY, number, DRAWS)
            alpha, sigma = (scale[:, None, None, None] for scale in policy.path.alpha_sigma(draw.t.double()))
            with torch.no_grad():
                prediction = policy.predict(alpha * x0 + sigma * draw.eps, draw.t, conditioning)
            parts.append(prediction - policy.path.target(x0, draw.eps, draw.t.double()))
        differences.append(torch.cat(parts, dim=1))
    scale = safeguard_scale(*differences, mu=0.6)
    assert 0 < int((scale < 1).sum())
    slopes = torch.autograd.grad(
        (batch.weight * diffusion_dpo_loss(*four, beta=30.0)).mean(), four[:2], retain_graph=True
    )
    expected = gradients(policy, (slopes[0] * four[0] + slopes[1] * scale * four[1]).sum())
    guarded = make("diffusion_dpo", policy, draws=DRAWS, safeguard=True, safeguard_mu=0.6)
    close(gradients(policy, guarded.loss(policy, batch, KEY).loss), expected)


def test_the_automatic_beta_is_that_of_mean_margins() -> None:
    policy = make_policy()
    batch = make_batch("diffusion_dpo", policy)
    four = mean_errors(policy, (batch.winner, batch.loser), batch.keys, KEY, prompts_of(policy, batch))
    expected = float(auto_beta(pair_margin(*four, beta=1.0), target=0.2, maximum=5000.0))
    algorithm = make("diffusion_dpo", policy, beta=5000.0, auto_beta=True, draws=DRAWS)
    measured = algorithm.with_measured(batch, algorithm.measure(policy, batch, KEY)).measured
    assert measured == pytest.approx(expected, rel=BOUND) and expected < 5000


# ---- anchor ------------------------------------------------------------------------------------------------


def moved_reference() -> ToyPolicy:
    """Current, reference and base apart from one another."""
    policy = make_policy()
    policy.weights.load("reference", policy.weights.state("old"))
    return policy


def distances_by_hand(
    policy: ToyPolicy, batch: PairBatch, conditioning: Conditioning, guidance: float, version: str = "base"
) -> Tensor:
    """|policy - anchor|^2 / elements of both images at all draws, (2, DRAWS, B), with the base under its own name."""
    empty = policy.encode_prompts([""] * len(batch))
    found = []
    for x0 in (batch.winner, batch.loser):
        for number in range(DRAWS):
            draw = own_draw(policy, batch.keys, KEY, number, DRAWS)
            alpha, sigma = (scale[:, None, None, None] for scale in policy.path.alpha_sigma(draw.t.double()))
            x_t = alpha * x0 + sigma * draw.eps
            with policy.weights.use(version), torch.no_grad():
                e_c, e_u = (policy.predict(x_t, draw.t, prompt) for prompt in (conditioning, empty))
            difference = policy.predict(x_t, draw.t, conditioning) - (e_u + guidance * (e_c - e_u))
            found.append((difference**2).flatten(1).mean(dim=1))
    return torch.stack(found).unflatten(0, (2, DRAWS))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["diffusion_dpo", "spin"])
def test_the_anchor_adds_its_share_of_half_beta_times_the_distance_from_the_base(
    name: str, guidance: float
) -> None:
    policy = moved_reference()
    batch = make_batch(name, policy)
    conditioning = prompts_of(policy, batch)
    four = mean_errors(policy, (batch.winner, batch.loser), batch.keys, KEY, conditioning)
    distance = distances_by_hand(policy, batch, conditioning, guidance).mean(dim=(0, 1))
    per_pair = diffusion_dpo_loss(*four, beta=30.0) + 0.2 * 15.0 * distance
    expected = (batch.weight * per_pair).mean()
    anchor = {"anchor_weight": 0.2, "anchor_guidance": guidance, "reference": "previous"}
    algorithm = make(name, policy, draws=DRAWS, **anchor)
    output = algorithm.loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, expected, rtol=BOUND, atol=BOUND)
    slopes = gradients(policy, output.loss)
    close(slopes, gradients(policy, expected))
    total, count = output.metrics["train/anchor_distance"]
    assert float(total) / count == pytest.approx(float(distance.detach().mean()), rel=BOUND)

    # Finite differences along one direction: the slope of the very loss that is trained.
    start = policy.weights.state("current")
    direction = {
        key: torch.randn(value.shape, generator=torch_generator(key)) for key, value in start.items()
    }
    values = []
    for step in (1e-5, -1e-5):
        policy.weights.load("current", {key: value + step * direction[key] for key, value in start.items()})
        values.append(float(algorithm.loss(policy, batch, KEY).loss.detach()))
    policy.weights.load("current", start)
    slope = sum(float((slopes[key] * direction[key]).sum()) for key in slopes)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["diffusion_dpo", "spin"])
def test_the_proximal_term_is_its_share_of_half_beta_times_the_distance_from_the_reference(name: str) -> None:
    policy = moved_reference()
    batch = make_batch(name, policy)
    conditioning = prompts_of(policy, batch)
    four = mean_errors(policy, (batch.winner, batch.loser), batch.keys, KEY, conditioning)
    distance = distances_by_hand(policy, batch, conditioning, 1.0, "reference").mean(dim=(0, 1))
    expected = (batch.weight * (diffusion_dpo_loss(*four, beta=30.0) + 0.7 * 15.0 * distance)).mean()
    algorithm = make(name, policy, draws=DRAWS, proximal_weight=0.7, reference="previous")
    output = algorithm.loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, expected, rtol=BOUND, atol=BOUND)
    close(gradients(policy, output.loss), gradients(policy, expected))
    # No forward besides those of policy and reference.
    assert algorithm.settings.anchor_forwards == 0


def test_from_weight_one_on_a_pairs_loss_is_convex_where_training_starts() -> None:
    """In the loser's prediction, along the line through the reference's and the target."""
    target, away = 1e-3, torch.linspace(-1e-3, 1e-3, 3)
    winner = torch.full((3,), 0.5)
    reference = torch.full((3,), target**2)

    def bend(weight: float) -> float:
        loss = diffusion_dpo_loss(winner, (away - target).square(), winner, reference, beta=30.0)
        low, middle, high = (loss + weight * 15.0 * 0.5 * away.square()).tolist()
        return low + high - 2 * middle

    assert bend(0.0) < bend(0.95) < 0 < bend(1.0)


@pytest.mark.parametrize("held", [1, 2])
def test_with_fewer_anchor_draws_each_pair_is_held_at_those_that_its_key_names(held: int) -> None:
    policy = moved_reference()
    batch = make_batch("diffusion_dpo", policy)
    rows = held_rows(batch.keys, KEY, DRAWS, held)
    chosen = torch.zeros(DRAWS * len(batch), dtype=torch.float64)
    chosen[rows] = 1.0
    chosen = chosen.unflatten(0, (DRAWS, len(batch)))
    assert chosen.sum(dim=0).tolist() == [held] * len(batch)
    distances = distances_by_hand(policy, batch, prompts_of(policy, batch), 3.0)
    expected = (distances * chosen).sum(dim=(0, 1)) / (2 * held)
    anchor = {"anchor_guidance": 3.0, "reference": "previous", "draws": DRAWS}
    free = make("diffusion_dpo", policy, **anchor | {"anchor_guidance": 1.0}).loss(policy, batch, KEY)
    algorithm = make("diffusion_dpo", policy, **anchor, anchor_weight=0.2, anchor_draws=held)
    beta = algorithm.settings.beta
    loss = free.loss + (batch.weight * 0.2 * beta / 2 * expected).mean()
    torch.testing.assert_close(algorithm.loss(policy, batch, KEY).loss, loss, rtol=BOUND, atol=BOUND)
    # A pair alone is held where it is held in a batch.
    alone = torch.cat([held_rows((key,), KEY, DRAWS, held) for key in batch.keys])
    assert sorted(alone.tolist()) == sorted((rows // len(batch)).tolist())


def test_every_draw_has_the_same_chance_to_be_held() -> None:
    keys = [str(number) for number in range(3000)]
    for held in (1, 2):
        counts = torch.bincount(held_rows(keys, KEY, 3, held) // len(keys), minlength=3)
        # Five standard deviations of a binomial count around its mean.
        assert (counts - 1000 * held).abs().max() < 5 * (3000 * (held / 3) * (1 - held / 3)) ** 0.5
    assert held_rows(keys, KEY, 3, 3) is None


@pytest.mark.parametrize(
    ("reference", "guidance", "forwards"),
    [("base", 1.0, 2), ("base", 3.0, 3), ("previous", 1.0, 3), ("ema", 3.0, 4)],
)
def test_the_base_runs_only_for_what_the_reference_has_not_said(
    reference: str, guidance: float, forwards: int
) -> None:
    policy = make_policy()
    batch = make_batch("diffusion_dpo", policy)
    rows = []
    inner = policy.predict
    policy.predict = lambda *args: rows.append((len(args[0]), torch.is_grad_enabled())) or inner(*args)
    anchor = {"anchor_weight": 0.2, "anchor_guidance": guidance, "reference": reference}
    algorithm = make("diffusion_dpo", policy, **anchor)
    output = algorithm.loss(policy, batch, KEY)
    assert rows == [(2 * len(batch), True)] + [(2 * len(batch), False)] * (forwards - 1)
    assert 1 + len(algorithm.settings.versions) + algorithm.settings.anchor_forwards == forwards
    # With the base as reference the versions are the same weights: so are the losses.
    other = make("diffusion_dpo", policy, **anchor | {"reference": "previous"}).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, other.loss, rtol=BOUND, atol=BOUND)


def test_rows_with_the_empty_prompt_have_the_unguided_anchor() -> None:
    policy = moved_reference()
    batch = make_batch("diffusion_dpo", policy)
    shared = {"anchor_weight": 0.2, "reference": "previous", "empty_prompt_fraction": 1.0}
    plain, guided = (
        make("diffusion_dpo", policy, **shared, anchor_guidance=g).loss(policy, batch, KEY)
        for g in (1.0, 5.0)
    )
    torch.testing.assert_close(guided.loss, plain.loss, rtol=BOUND, atol=BOUND)
    assert float(plain.metrics["train/anchor_distance"][0]) > 0


def test_the_anchor_of_an_automatic_beta_is_a_share_of_it() -> None:
    policy = moved_reference()
    batch = replace(make_batch("diffusion_dpo", policy), weight=None)
    settings = {"beta": 5000.0, "auto_beta": True, "reference": "previous"}
    plain = make("diffusion_dpo", policy, **settings).loss(policy, batch, KEY)
    held = make("diffusion_dpo", policy, **settings, anchor_weight=0.2).loss(policy, batch, KEY)
    beta, distance = (
        float(held.metrics[name][0]) / held.metrics[name][1]
        for name in ("train/beta", "train/anchor_distance")
    )
    assert (
        float((held.loss - plain.loss).detach()) == pytest.approx(0.2 * beta / 2 * distance, rel=1e-9)
        and beta < 5000
    )


def test_a_guided_anchor_needs_the_empty_prompt() -> None:
    settings = DiffusionDpoConfig(empty_prompt_fraction=0.0, anchor_weight=0.1, anchor_guidance=2.0)
    with pytest.raises(ConfigError, match="anchor_guidance is 2, but no conditioning of the empty prompt"):
        DiffusionDpo(settings)
    assert settings.initial_loss is None and settings.start_loss is None
    assert settings.model_copy(update={"anchor_guidance": 1.0}).initial_loss == pytest.approx(0.6931472)


# ---- margins of single draws -------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Predicts eps as a multiple of what it sees, so that errors have a closed form."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.factor * x_t


def scaled_policy(factor: float, reference: float) -> ToyPolicy:
    """Of one level of noise, alpha = 0.8 and sigma = 0.6, on latents of 6 numbers."""
    policy = ToyPolicy(Path.vp(torch.full((8,), 0.64)), channels=6)
    policy.weights = make_weights(Scaled(reference), TOY_FULL, 0)
    policy.weights.load("current", {"factor": torch.tensor(factor, dtype=torch.float64)})
    return policy


@pytest.mark.parametrize("is_changed", [False, True])
def test_signal_and_noise_of_margins_are_those_of_their_closed_form(is_changed: bool) -> None:
    """e(x) = mean((c alpha x + (c sigma - 1) eps)^2), so that with D numbers a pair's margin e_l - e_w has

        mean       (c alpha)^2 (|x_l|^2 - |x_w|^2) / D
        variance   (2 c alpha (c sigma - 1) / D)^2 |x_l - x_w|^2

    and what was changed has the differences of both coefficients.
    """
    policy, num = scaled_policy(0.9, 0.5), 24
    generator = torch.Generator().manual_seed(3)
    winner, loser = torch.randn(2, num, 6, 1, 1, generator=generator) * torch.tensor([[0.5], [1.5]]).view(
        2, 1, 1, 1, 1
    )
    keys = tuple(f"pair {row}" for row in range(num))
    batch = PairBatch(winner, loser, policy.encode_prompts(["a"] * num), keys)
    algorithm = make("diffusion_dpo", policy, empty_prompt_fraction=0.0)
    margins = algorithm.margins(policy, batch, KEY, 512, is_changed=is_changed)
    assert margins.shape == (num, 512) and not margins.requires_grad
    squares, products = (
        scale(0.9) - is_changed * scale(0.5)
        for scale in (lambda c: (c * 0.8) ** 2, lambda c: 2 * c * 0.8 * (c * 0.6 - 1))
    )
    means = squares * (loser.square() - winner.square()).flatten(1).mean(dim=1)
    variances = (products / 6) ** 2 * (loser - winner).square().flatten(1).sum(dim=1)
    # 512 draws: a standard error of a pair's mean is 4.4% of its noise, and of the mean variance 1.3%.
    assert ((margins.mean(dim=1) - means).abs() < 4.5 * (variances / 512).sqrt()).all()
    found = margin_signal(margins)
    assert found.noise**2 == pytest.approx(float(variances.mean()), rel=0.07)
    assert found.signal**2 == pytest.approx(float(means.square().mean()), rel=0.07)


def test_margins_of_draws_are_keyed_by_pair_and_number_and_are_those_of_the_loss() -> None:
    policy = moved_reference()
    batch = make_batch("diffusion_dpo", policy)
    algorithm = make("diffusion_dpo", policy, reference="previous", empty_prompt_fraction=0.0)
    whole = algorithm.margins(policy, batch, KEY, 3, is_changed=True)
    halves = [
        algorithm.margins(policy, split_batch(batch, *part), KEY, 3, is_changed=True)
        for part in ((0, 3), (3, len(batch)))
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=BOUND, atol=BOUND)
    # The first draw alone is the margin that the loss logs at that key, beta / 2 aside.
    logged = algorithm.loss(policy, replace(batch, weight=None), (*KEY, 0)).metrics["train/margin"]
    assert 15.0 * float(whole[:, 0].mean()) == pytest.approx(float(logged[0]) / logged[1], rel=1e-9)
    own = algorithm.margins(policy, batch, KEY, 3, is_changed=False)
    assert not torch.allclose(own, whole)
    same = make_policy(moved=False)
    assert (algorithm.margins(same, batch, KEY, 2, is_changed=True) == 0).all()
    assert torch.equal(
        Expo(ExpoConfig(beta=30.0, empty_prompt_fraction=0.0)).margins(
            policy, batch, KEY, 3, is_changed=True
        ),
        whole,
    )


# ---- common part -------------------------------------------------------------------------------------------


def test_the_common_part_is_the_rise_of_both_errors_over_the_references() -> None:
    policy = moved_reference()
    batch = make_batch("diffusion_dpo", policy)
    four = mean_errors(policy, (batch.winner, batch.loser), batch.keys, KEY, prompts_of(policy, batch))
    winner, loser, winner_ref, loser_ref = (float(error.detach().mean()) for error in four)
    settings = {"draws": DRAWS, "reference": "previous"}
    total, below = (
        make("diffusion_dpo", policy, **settings).loss(policy, batch, KEY).metrics["train/common_part"]
    )
    expected = (winner + loser - winner_ref - loser_ref) / (winner_ref + loser_ref)
    assert float(total) / float(below) == pytest.approx(expected, rel=1e-10)
    assert "train/common_part" not in make("mapo", policy).loss(policy, batch, KEY).metrics
    start = make_policy(moved=False)
    assert float(make("diffusion_dpo", start).loss(start, batch, KEY).metrics["train/common_part"][0]) == 0


# ---- how far predictions have moved ------------------------------------------------------------------------


def own_predictions(policy: ToyPolicy, batch: PairBatch, version: str) -> Tensor:
    """Predictions of winners and losers at every draw, each by a forward of its own; or what they should be (`target`)."""
    found = []
    for side in (batch.winner, batch.loser):
        for number in range(DRAWS):
            draw = own_draw(policy, batch.keys, KEY, number, DRAWS)
            images = NoisyImages.at(policy, side, draw.eps, draw.t, prompts_of(policy, batch))
            if version == "target":
                found.append(images.target)
            else:
                with policy.weights.use(version), torch.no_grad():
                    found.append(images.predict(policy))
    return torch.cat(found)


def moved_metrics(policy: ToyPolicy, batch: PairBatch, **settings: object) -> dict[str, float]:
    metrics = (
        make("diffusion_dpo", policy, draws=DRAWS, reference="previous", **settings)
        .loss(policy, batch, KEY)
        .metrics
    )
    return {name: float(total) / float(below) for name, (total, below) in metrics.items()}


def test_norms_and_distance_of_predictions_are_those_of_forwards_of_their_own() -> None:
    policy = moved_reference()
    batch = make_batch("diffusion_dpo", policy)
    current, reference = (own_predictions(policy, batch, version) for version in ("current", "reference"))
    norm = lambda rows: rows.flatten(1).square().sum(dim=1).sqrt()
    found = moved_metrics(policy, batch)
    expected = float((norm(current) / norm(reference)).mean())
    assert abs(expected - 1) > 1e-3
    assert found["train/prediction_norm_ratio"] == pytest.approx(expected, rel=1e-10)
    distance = float((current - reference).square().mean())
    assert found["train/reference_distance"] == pytest.approx(distance, rel=1e-10) and distance > 1e-6
    policy.weights.copy("current", "reference")
    found = moved_metrics(policy, batch)
    assert found["train/prediction_norm_ratio"] == 1 and found["train/reference_distance"] == 0
    metrics = make("mapo", policy).loss(policy, batch, KEY).metrics
    assert (
        not {"train/prediction_norm_ratio", "train/reference_distance", "train/anchor_error"} & metrics.keys()
    )


def test_the_error_of_the_anchor_is_that_of_its_prediction() -> None:
    policy = moved_reference()
    batch = make_batch("diffusion_dpo", policy)
    target, base = (own_predictions(policy, batch, version) for version in ("target", "base"))
    found = moved_metrics(policy, batch, anchor_weight=0.1)
    assert found["train/anchor_error"] == pytest.approx(float((base - target).square().mean()), rel=1e-10)
    reference = own_predictions(policy, batch, "reference")
    ratio = base.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    assert found["train/anchor_norm_ratio"] == pytest.approx(float(ratio.mean()), rel=1e-10)
    assert abs(float(ratio.mean()) - 1) > 1e-4
    assert "train/anchor_error" not in moved_metrics(policy, batch)
