"""Guidance distillation against its formula, and against the anchor of losses on pairs, which it is without a preference.

In float64, with the bound of `test_methods`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffexpo.algorithms import guidance_distillation_loss
from diffexpo.algorithms.forward import RowLosses
from diffexpo.algorithms.guidance_distillation import GuidanceDistillation
from diffexpo.algorithms.pairs import PairErrors, PairMethod
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.guidance_distillation import GuidanceDistillationConfig
from diffexpo.config.schema import LoraConfig, TuningConfig
from diffexpo.diffusion import NoiseDraw, Path, empty_prompt_mask
from diffexpo.errors import ConfigError
from diffexpo.policies.toy import TEXT_WIDTH, TOY_FULL, TOY_LORA, ToyPolicy
from diffexpo.policies.weights import make_weights
from diffexpo.types import Conditioning, PairBatch, ScoredBatch
from tests.unit.algorithms.methods import KEY, PATHS, gradients, make, make_batch, make_policy
from tests.unit.diffusion.toys import ABAR

pytestmark = pytest.mark.usefixtures("float64")
BOUND = 1e-11
# Adapters compute in float32: some roundings of 6e-8.
FLOAT32 = 1e-6
MODELS = PATHS | {"v": Path.vp(ABAR, "v_prediction")}
G = 3.0


class Linear(nn.Module):
    """prediction = x_t + W text. The empty prompt's text is 0, so W g is the model guided at g."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(TEXT_WIDTH, channels, bias=False)
        # Eighths are exact in the float32 of adapters too.
        numbers = torch.randint(-16, 17, (channels, TEXT_WIDTH), generator=torch.Generator().manual_seed(0))
        self.first.weight.data = numbers / 8

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return x_t + self.first(text)[:, :, None, None]


def linear_policy(kind: str, tuning: TuningConfig) -> ToyPolicy:
    policy = ToyPolicy(MODELS[kind])
    policy.weights = make_weights(Linear(2), tuning, 0)
    return policy


def become_guided(policy: ToyPolicy, scale: float) -> None:
    """Make "current" the base guided at `scale`."""
    with policy.weights.use("base"):
        weight = dict(policy.weights.network.named_parameters())
    state = policy.weights.state("current")
    if policy.weights.kind == "full":
        state = {name: scale * value for name, value in state.items()}
    else:  # B A = (scale - 1) W, of full rank, with alpha / rank = 1
        base = next(value for name, value in weight.items() if "lora" not in name).detach()
        down = next(name for name in state if "lora_A" in name)
        up = next(name for name in state if "lora_B" in name)
        state = {down: (scale - 1) * base, up: torch.eye(2)}
    policy.weights.load("current", state)


LINEAR = {
    "full": TOY_FULL,
    "lora": TuningConfig(kind="lora", lora=LoraConfig(rank=2, target_modules=("first",))),
}


@pytest.mark.parametrize("tuning", LINEAR)
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_left_to_learn_where_the_policy_is_the_guided_base(kind: str, tuning: str) -> None:
    policy = linear_policy(kind, LINEAR[tuning])
    batch = make_batch("guidance_distillation", policy)
    algorithm = make("guidance_distillation", policy, guidance=G)
    before = algorithm.loss(policy, batch, KEY)
    largest = max(float(slope.abs().max()) for slope in gradients(policy, before.loss).values())
    assert float(before.loss.detach()) > 0.1 and largest > 0.1
    become_guided(policy, G)
    after = algorithm.loss(policy, batch, KEY)
    assert float(after.loss.detach()) < BOUND
    bound = (BOUND if tuning == "full" else FLOAT32) * largest
    assert all(float(slope.abs().max()) < bound for slope in gradients(policy, after.loss).values())
    # Another scale is another target.
    become_guided(policy, 2.0)
    assert float(algorithm.loss(policy, batch, KEY).loss.detach()) > 0.01


def moved_policy(kind: str, tuning: str) -> ToyPolicy:
    """Current and reference apart from the base, and from each other."""
    policy = ToyPolicy(MODELS[kind], tuning={"full": TOY_FULL, "lora": TOY_LORA}[tuning])
    generator = torch.Generator().manual_seed(0)
    for version in ("reference", "current"):
        state = policy.weights.state("current")
        noise = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        policy.weights.load(version, {name: value + noise[name] for name, value in state.items()})
    return policy


def predictions(
    policy: ToyPolicy, batch: ScoredBatch, prompts: Conditioning
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy's prediction and the base's two, by the path's own formulas."""
    draw = NoiseDraw.keyed(batch.keys, KEY, policy.path, batch.latents.shape[1:])
    alpha, sigma = (scale[:, None, None, None] for scale in policy.path.alpha_sigma(draw.t.double()))
    x_t = alpha * batch.latents + sigma * draw.eps
    current = policy.predict(x_t, draw.t, prompts)
    with policy.weights.use("base"), torch.no_grad():
        unconditional = policy.predict(x_t, draw.t, policy.encode_prompts([""] * len(batch)))
        return current, unconditional, policy.predict(x_t, draw.t, prompts)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tuning: str) -> None:
    """Slopes, beside the largest of them."""
    largest = max(float(slope.abs().max()) for slope in expected.values())
    for name, slope in expected.items():
        bound = BOUND if tuning == "full" else FLOAT32
        torch.testing.assert_close(found[name], slope, rtol=0, atol=bound * largest)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_class_compares_with_the_guided_base_under_its_own_name(kind: str, tuning: str) -> None:
    policy = moved_policy(kind, tuning)
    batch = make_batch("guidance_distillation", policy)
    mask = empty_prompt_mask(batch.keys, KEY, 0.5)
    assert 0 < int(mask.sum()) < len(mask)
    empty = policy.encode_prompts([""]).tensors["text"]
    prompts = Conditioning({"text": torch.where(mask[:, None], empty, batch.conditioning.tensors["text"])})
    current, unconditional, conditional = predictions(policy, batch, prompts)
    guided = torch.where(
        mask[:, None, None, None], unconditional, unconditional + G * (conditional - unconditional)
    )
    expected = ((current - guided) ** 2).flatten(1).mean(dim=1).mean()
    output = make("guidance_distillation", policy, guidance=G).loss(policy, batch, KEY)
    torch.testing.assert_close(output.loss, expected, rtol=BOUND, atol=BOUND)
    assert_close(gradients(policy, output.loss), gradients(policy, expected), tuning)
    gap, count = output.metrics["train/guidance_gap"]
    assert float(gap) / count == pytest.approx(float(((conditional - guided) ** 2).mean()), rel=1e-9)


class NoPreference(PairMethod):
    """What is left of a method on pairs whose preference weighs nothing."""

    def losses_of_errors(self, errors: PairErrors, batch: PairBatch) -> RowLosses:
        return 0.0 * (errors.winner - errors.loser), {}


@pytest.mark.parametrize("reference", ["base", "previous"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_anchor_of_a_method_on_pairs_without_the_preference(
    kind: str, tuning: str, reference: str
) -> None:
    """Value and gradient; a pair's images share noise, time and prompt, so each image is given its pair's name."""
    policy = moved_policy(kind, tuning)
    if reference == "base":
        policy.weights.copy("base", "reference")
    pairs = replace(make_batch("diffusion_dpo", policy), weight=None)
    shared = {"empty_prompt_fraction": 0.5}
    settings = DiffusionDpoConfig(
        beta=2.0, anchor_weight=1.0, anchor_guidance=G, reference=reference, **shared
    )
    held = NoPreference(settings, policy.encode_prompts([""])).loss(policy, pairs, KEY)
    algorithm = make("guidance_distillation", policy, guidance=G, **shared)
    scored = make_batch("guidance_distillation", policy)
    sides = [
        replace(scored, latents=latents, conditioning=pairs.conditioning, keys=pairs.keys)
        for latents in (pairs.winner, pairs.loser)
    ]
    alone = sum(algorithm.loss(policy, side, KEY).loss for side in sides) / 2
    torch.testing.assert_close(held.loss, alone, rtol=BOUND, atol=BOUND)
    found, expected = gradients(policy, held.loss), gradients(policy, alone)
    assert any(bool((slope != 0).any()) for slope in expected.values())
    assert_close(found, expected, tuning)


def test_at_the_start_the_loss_is_the_gap_that_guidance_opens() -> None:
    policy = make_policy(moved=False)
    batch = make_batch("guidance_distillation", policy)
    losses = []
    for guidance in (2.0, 5.0):
        output = make("guidance_distillation", policy, guidance=guidance).loss(policy, batch, KEY)
        total, count = output.metrics["train/guidance_gap"]
        assert float(total) / count == pytest.approx(float(output.loss.detach()), rel=BOUND)
        losses.append(float(output.loss.detach()))
    assert losses[1] / losses[0] == pytest.approx((5 - 1) ** 2 / (2 - 1) ** 2, rel=1e-9)


def test_no_score_is_looked_at() -> None:
    policy = make_policy()
    batch = make_batch("guidance_distillation", policy)
    nothing = torch.full_like(batch.rewards, torch.nan)
    blind = replace(batch, rewards=nothing, advantages=nothing, desirable=~batch.desirable)
    losses = [make("guidance_distillation", policy).loss(policy, given, KEY).loss for given in (batch, blind)]
    assert torch.equal(*losses)


def test_it_needs_the_empty_prompt_and_a_scale_above_1() -> None:
    settings = GuidanceDistillationConfig(guidance=2.0)
    with pytest.raises(ConfigError, match=r"algorithm\.guidance is 2, but no conditioning of the empty"):
        GuidanceDistillation(settings)
    with pytest.raises(ValueError, match="greater than 1"):
        GuidanceDistillationConfig(guidance=1.0)
    assert settings.learned_guidance == 2.0 and settings.anchor_forwards == 2


def test_the_function_is_zero_at_the_guided_prediction_and_a_square_around_it() -> None:
    v, u, c = torch.randn(3, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    guided = u + G * (c - u)
    assert float(guidance_distillation_loss(guided, u, c, guidance=G).abs().max()) < BOUND
    one, two = (guidance_distillation_loss(guided + k * v, u, c, guidance=G) for k in (1, 2))
    torch.testing.assert_close(two, 4 * one)
    plain = (v - c).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(guidance_distillation_loss(v, u, c, guidance=1.0), plain)
