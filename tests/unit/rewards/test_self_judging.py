"""Models as their own judges: exact zeros, a world where the right order is known, the same bits in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.config import load_config
from diffexpo.config.rewards import REWARDS, SelfJudgeConfig, read_card
from diffexpo.diffusion.objectives import NoiseDraw
from diffexpo.errors import ConfigError, RewardError
from diffexpo.policies.toy import TOY_FULL, TOY_LORA, ToyNetwork, ToyPolicy
from diffexpo.policies.weights import make_weights
from diffexpo.rewards.base import load_rewards
from diffexpo.rewards.jpeg import JpegCompressibility
from diffexpo.rewards.scoring import reads_latents, score_drawn
from diffexpo.rewards.self_judging import DenoisingReward, ImplicitReward, denoising_scores, implicit_scores
from diffexpo.types import Conditioning, Drawn
from tests.learning.toy import PATHS

TEXTS = ["a", "b c", "a", "d", "b c", "a", "e", "d", "a"]
LATENTS = torch.randn(len(TEXTS), 2, 1, 1, generator=torch.Generator().manual_seed(1))
SELF_JUDGES = [name for name, card in REWARDS.items() if card.reads == "latents"]
SETTINGS = SelfJudgeConfig(draws=5, timestep_range=(0.2, 0.9), beta=40.0)
MEANS = {"": (0.0, 0.0), "right": (1.0, 0.0), "up": (0.0, 2.0)}
SHIFT = (0.6, -0.3)


def errors(seed: int) -> Tensor:
    return torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moved(tuning=TOY_FULL) -> ToyPolicy:
    """A toy whose "current" has left its base."""
    policy = ToyPolicy(PATHS["vp"], tuning=tuning)
    state = policy.weights.state("current")
    noise = torch.Generator().manual_seed(3)
    policy.weights.load(
        "current",
        {name: value + 0.1 * torch.randn(value.shape, generator=noise) for name, value in state.items()},
    )
    return policy


class Gaussians:
    """The exact denoiser of x0 ~ N(mean of the prompt + shift of the version, 1), where every answer is known.

    eps*(x_t) = sigma_t (x_t - alpha_t mean), because alpha_t^2 + sigma_t^2 = 1.
    """

    path = PATHS["vp"]
    latent_shape = (2, 1, 1)
    device = torch.device("cpu")
    fingerprint = "gaussians"

    def __init__(self) -> None:
        self.version = "base"
        self.weights = SimpleNamespace(use=self._use, fingerprint=str, state=lambda name: {})

    @contextmanager
    def _use(self, version: str) -> Iterator[None]:
        previous, self.version = self.version, version
        yield
        self.version = previous

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning({"mean": torch.tensor([MEANS[text] for text in prompts])})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in self.path.alpha_sigma(t.double()))
        shift = torch.tensor(SHIFT if self.version == "current" else (0.0, 0.0))
        mean = (conditioning.tensors["mean"] + shift).reshape(-1, 2, 1, 1)
        return sigma * (x_t - alpha * mean)


def numpy_errors(judge, latents: Tensor, prompt: str, mean: tuple[float, float]) -> np.ndarray:
    """(B,K) errors of a Gaussian's denoiser, from the formula."""
    draw = NoiseDraw.keyed(
        [str(number) for number in range(judge.settings.draws)],
        ("self-judge", prompt),
        judge.policy.path,
        (2, 1, 1),
        judge.settings.timestep_range,
    )
    alpha, sigma = (
        value.double().numpy()[:, None] for value in judge.policy.path.alpha_sigma(draw.t.double())
    )
    eps, x0 = draw.eps[:, :, 0, 0].double().numpy(), latents[:, :, 0, 0].double().numpy()
    x_t = alpha * x0[:, None] + sigma * eps
    return ((sigma * (x_t - alpha * np.array(mean)) - eps) ** 2).mean(axis=2)


# ---- the pure functions ----------------------------------------------------------------------------------------------


def test_scores_equal_their_formulas_in_numpy() -> None:
    first, second = errors(0), errors(1)
    a, b = first.numpy(), second.numpy()
    implicit = implicit_scores(first, second, beta=7.0)
    assert implicit.dtype == torch.float64
    np.testing.assert_allclose(implicit.numpy(), 3.5 * np.mean(b - a, axis=1), rtol=1e-13)
    np.testing.assert_allclose(denoising_scores(first, second).numpy(), np.mean(b - a, axis=1), rtol=1e-13)


def test_equal_errors_score_exactly_zero_and_swapping_changes_the_sign() -> None:
    first, second = errors(0), errors(1)
    assert not implicit_scores(first, first.clone(), beta=5000.0).any()
    assert not denoising_scores(first, first.clone()).any()
    assert torch.equal(implicit_scores(first, second, beta=2.0), -implicit_scores(second, first, beta=2.0))
    assert torch.equal(implicit_scores(first, second, beta=2.0), denoising_scores(first, second))


def test_half_precision_errors_are_compared_in_float32() -> None:
    high, low = torch.full((1, 2), 1.0, dtype=torch.bfloat16), torch.full((1, 2), 0.5, dtype=torch.bfloat16)
    assert implicit_scores(low, high, beta=1.0).dtype == torch.float32


@pytest.mark.parametrize(
    "call",
    [
        lambda: implicit_scores(errors(0), errors(0)[:, :2], beta=1.0),
        lambda: denoising_scores(errors(0)[:, 0], errors(0)[:, 0]),
        lambda: implicit_scores(errors(0), errors(1), beta=0.0),
    ],
)
def test_what_has_no_meaning_is_refused(call) -> None:
    with pytest.raises(ValueError, match="expected"):
        call()


# ---- exact zeros -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [TOY_FULL, TOY_LORA], ids=["full", "lora"])
def test_implicit_of_equal_weights_is_exactly_zero_and_refused_at_the_start(tuning) -> None:
    policy = moved(tuning)
    judge = ImplicitReward("own", policy, SETTINGS)
    assert judge.score(LATENTS, TEXTS).all()
    policy.weights.load("current", policy.weights.state("base"))
    assert not judge.score(LATENTS, TEXTS).any()
    with pytest.raises(ConfigError, match="reward 'own'.*every image would score 0"):
        ImplicitReward("own", policy, SETTINGS)


def test_an_untrained_adapter_is_the_base_whatever_its_first_factor() -> None:
    policy = ToyPolicy(PATHS["vp"], tuning=TOY_LORA)
    state = policy.weights.state("current")
    policy.weights.load("current", {n: v if ".lora_B." in n else v + 1 for n, v in state.items()})
    assert policy.weights.fingerprint("current") != policy.weights.fingerprint("base")
    with pytest.raises(ConfigError, match="would score 0"):
        ImplicitReward("own", policy, SETTINGS)


def test_denoising_of_an_unconditional_model_is_exactly_zero() -> None:
    policy, network = ToyPolicy(PATHS["vp"]), ToyNetwork(2, 32, 0)
    assert DenoisingReward("told", policy, SETTINGS).score(LATENTS, TEXTS).all()
    with torch.no_grad():
        network.first.weight[:, 5:] = 0  # the columns of the text
    policy.weights = make_weights(network, TOY_FULL, 0)
    assert not DenoisingReward("told", policy, SETTINGS).score(LATENTS, TEXTS).any()


# ---- a world where the answer is known -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["right", "up"])
@pytest.mark.parametrize("kind", SELF_JUDGES)
def test_judges_equal_numpy_on_gaussians(kind: str, prompt: str) -> None:
    latents = LATENTS * 2
    judge = (ImplicitReward if kind == "implicit" else DenoisingReward)("own", Gaussians(), SETTINGS)
    mean = MEANS[prompt]
    trained = tuple(np.add(mean, SHIFT))
    expected = {
        "implicit": 20.0
        * (numpy_errors(judge, latents, prompt, mean) - numpy_errors(judge, latents, prompt, trained)),
        "denoising": numpy_errors(judge, latents, prompt, (0.0, 0.0))
        - numpy_errors(judge, latents, prompt, mean),
    }[kind].mean(axis=1)
    found = judge.score(latents, [prompt] * len(latents)).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", SELF_JUDGES)
def test_candidates_of_a_prompt_are_ordered_as_the_truth_orders_them(kind: str) -> None:
    """log p_trained(x) - log p_base(x), and log p(x|c) - log p(x), are linear in x; with shared draws so is the score, at any K."""
    one = SelfJudgeConfig(draws=1)
    judge = (ImplicitReward if kind == "implicit" else DenoisingReward)("own", Gaussians(), one)
    latents = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    axis = torch.tensor(SHIFT if kind == "implicit" else MEANS["right"])
    truth = (latents[:, :, 0, 0] * axis).sum(dim=1)
    found = judge.score(latents, ["right"] * 64)
    assert torch.equal(truth.argsort(), found.argsort())


def test_a_judge_that_was_trained_on_pairs_orders_new_ones(tmp_path) -> None:
    """The toy of tests/learning: the winner of a pair lies further along the first axis."""
    from tests.learning.toy import SidePairs, make_policy, train_offline

    policy = make_policy("vp", "full")
    dpo = load_config([], ["algorithm={type: diffusion_dpo, beta: 20.0}", "explore.iterations=1"], {}).config
    train_offline(policy, dpo.algorithm, SidePairs(policy, 64), tmp_path, steps=80, rate=1e-3)
    judge = ImplicitReward("own", policy, SelfJudgeConfig(draws=8))
    latents = torch.randn(2, 60, 2, 1, 1, generator=torch.Generator().manual_seed(8))
    texts = [f"word {index % 24}" for index in range(60)]
    gaps = judge.score(latents[0], texts) - judge.score(latents[1], texts)
    truth = (latents[0] - latents[1])[:, 0, 0, 0]
    assert float(((gaps > 0) == (truth > 0)).float().mean()) > 0.85


# ---- the same score whatever stands beside it ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SELF_JUDGES)
@pytest.mark.parametrize("tuning", [TOY_FULL, TOY_LORA], ids=["full", "lora"])
def test_scores_have_the_same_bits_in_any_batch_and_order(kind: str, tuning) -> None:
    make = lambda: (ImplicitReward if kind == "implicit" else DenoisingReward)("own", moved(tuning), SETTINGS)
    judge = make()
    whole = judge.score(LATENTS, TEXTS)
    alone = [judge.score(LATENTS[row : row + 1], [TEXTS[row]]) for row in range(len(TEXTS))]
    assert torch.equal(whole, torch.cat(alone))
    assert torch.equal(whole, make().score(LATENTS.flip(0), TEXTS[::-1]).flip(0))
    split = score_drawn([make()], Drawn(LATENTS), TEXTS, batch_size=4)["own"]
    assert np.array_equal(split, whole.numpy()) and split.dtype == np.float32
    assert judge.score(LATENTS[:0], []).shape == (0,)


def test_draws_belong_to_the_prompt() -> None:
    judge = DenoisingReward("told", moved(), SETTINGS)
    same = judge.score(LATENTS[:1].expand(2, -1, -1, -1), ["a", "a"])
    assert same[0] == same[1]
    assert torch.equal(judge._draw("a").eps, judge._draw("a").eps)
    assert not torch.equal(judge._draw("a").eps, judge._draw("d").eps)
    low, high = SETTINGS.timestep_range
    assert all(low <= float(t) <= high for t in judge._draw("a").t)


def test_the_version_names_weights_and_settings() -> None:
    policy, other = moved(), moved(TOY_LORA)
    judges = [
        ImplicitReward("own", policy, SETTINGS),
        ImplicitReward("own", other, SETTINGS),
        ImplicitReward("own", policy, SETTINGS.model_copy(update={"draws": 6})),
        ImplicitReward("own", policy, SETTINGS.model_copy(update={"beta": 1.0})),
        ImplicitReward("own", policy, SETTINGS.model_copy(update={"timestep_range": (0.0, 0.9)})),
        DenoisingReward("own", policy, SETTINGS),
    ]
    assert len({judge.version for judge in judges}) == len(judges)
    assert judges[0].version == ImplicitReward("else", moved(), SETTINGS).version
    assert "5 draws" in judges[0].scale and "beta 40" in judges[0].scale and "beta" not in judges[5].scale


# ---- beside other scorers --------------------------------------------------------------------------------------------


def test_scorers_of_images_and_of_latents_are_given_what_they_read() -> None:
    policy = moved()
    scorers = [
        DenoisingReward("told", policy, SETTINGS),
        JpegCompressibility("size"),
        ImplicitReward("own", policy, SETTINGS),
    ]
    assert [reads_latents(scorer) for scorer in scorers] == [True, False, True]
    images = policy.decode_latents(LATENTS)
    found = score_drawn(scorers, Drawn(LATENTS, images), TEXTS)
    assert list(found) == ["told", "size", "own"]
    assert np.array_equal(found["size"], scorers[1].score(images, TEXTS).numpy())
    assert np.array_equal(found["own"], scorers[2].score(LATENTS, TEXTS).numpy())


def test_latents_that_are_not_finite_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    latents = LATENTS.clone()
    latents[2] = torch.nan
    found = score_drawn([DenoisingReward("told", moved(), SETTINGS)], Drawn(latents), TEXTS)["told"]
    assert np.isnan(found).tolist() == [row == 2 for row in range(len(TEXTS))]
    assert "'told' gave no finite score for 1 of 9" in caplog.text


def test_other_latents_and_missing_prompts_are_refused() -> None:
    judge = DenoisingReward("told", moved(), SETTINGS)
    with pytest.raises(RewardError, match=r"'told': latents of shape \(9, 1, 1, 1\).*\(9, 2, 1, 1\)"):
        judge.score(LATENTS[:, :1], TEXTS)
    with pytest.raises(RewardError, match="for 1 prompts"):
        judge.score(LATENTS, ["a"])


def test_without_a_run_there_are_no_latents_to_judge() -> None:
    with pytest.raises(
        ConfigError, match="'own': type denoising judges the latents.*neither served nor verified"
    ):
        load_rewards([read_card(name="own", type="denoising")], str, "cpu")
    found = load_rewards([read_card(name="own", type="denoising")], str, "cpu", lambda config: moved())
    assert isinstance(found[0], DenoisingReward) and found[0].name == "own"


# ---- settings --------------------------------------------------------------------------------------------------------

IMPLICIT = "type: implicit, path: runs/dpo_offline"


def load(reward: str, *others: str):
    return load_config([], [f"rewards=[{{name: own, {reward}}}]", *others], {}).config


@pytest.mark.parametrize(
    ("reward", "others", "reason"),
    [
        ("type: implicit", [], "path is empty: type implicit needs a run"),
        ("type: implicit, path: emoji:diffusion", [], "of the base itself it is 0"),
        ("type: clip, path: x, self_judge: {draws: 2}", [], "asks no model for denoising errors"),
        (f"{IMPLICIT}, self_judge: {{timestep_range: [0.5, 0.5]}}", [], "holds no time"),
        ("type: denoising, self_judge: {beta: 2}", [], "denoising has no beta"),
        (f"{IMPLICIT}, base: x", [], "stands on no other model"),
        (f"{IMPLICIT}, scale: raw", [], "has its own unit"),
        (f"{IMPLICIT}, self_judge: {{draws: 0}}", [], "draws"),
        ("type: denoising", ["evaluation.judges=[{name: j, type: denoising}]"], "over-optimisation"),
        (IMPLICIT, [f"evaluation.judges=[{{name: j, {IMPLICIT}}}]"], "over-optimisation"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(reward: str, others: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(reward, *others)


@pytest.mark.parametrize(
    ("reward", "others"),
    [
        (IMPLICIT, []),
        (f"{IMPLICIT}, self_judge: {{draws: 2, timestep_range: [0.3, 1], beta: 1}}", []),
        ("type: denoising", []),
        ("type: denoising, path: some/model, precision: bfloat16", []),
        (IMPLICIT, ["evaluation.judges=[{name: j, type: denoising}]"]),
    ],
)
def test_what_belongs_together_is_accepted(reward: str, others: list[str]) -> None:
    assert load(reward, *others).rewards[0].name == "own"
