"""Path KL and bound difference against closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import NoiseSource, Path, sample
from diffexpo.evaluation.divergence import elbo_kl, kl_estimator, path_kl
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import torch_generator
from diffexpo.types import Conditioning

ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
SHAPE = (2, 2, 2)
# In float64: the KL is a sum of squared differences of means that nearly cancel, over up to 999 steps.
pytestmark = pytest.mark.usefixtures("float64")
TEXT = Conditioning({"text": torch.zeros(3, 1)})


class Versions:
    """Names whose weights are one number each."""

    def __init__(self, values: dict[str, float]) -> None:
        self.values, self.now = values, "base"

    @contextmanager
    def use(self, name: str, *, merged: bool = False) -> Iterator[None]:
        before, self.now = self.now, name
        yield
        self.now = before


class ShiftPolicy:
    """Predicts a linear function of x plus a constant: the version's weight. Its Gaussian answers are known."""

    def __init__(self, path: Path, slope: float, shifts: dict[str, float]) -> None:
        self.path, self.slope, self.weights = path, slope, Versions(shifts)
        self.device = torch.device("cpu")

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.slope * x_t + self.weights.values[self.weights.now]


class KnownImagePolicy(ShiftPolicy):
    """Knows the clean latent: version's weight everywhere. Predicts x0."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.full_like(x_t, self.weights.values[self.weights.now])


def noise(count: int = 3, shape: tuple[int, int, int] = SHAPE) -> NoiseSource:
    return NoiseSource([torch_generator(0, "kl", i) for i in range(count)], shape)


@pytest.mark.parametrize("steps", [5, 50])
def test_ancestral_path_kl_of_a_constant_shift_is_the_closed_form(steps: int) -> None:
    """eps differs by c everywhere, so KL = n c^2 sum_t b_t^2 / (2 s_t^2 a_t (1 - abar_t)), written in DDPM's own letters."""
    policy = ShiftPolicy(Path.vp(ABAR), 0.3, {"base": 0.1, "new": 0.35})
    index = [i * (1000 // steps) for i in range(steps)][::-1]
    total = 0.0
    for t, s in pairwise(index):
        a = float(ABAR[t] / ABAR[s])
        b = 1 - a
        variance = b * float((1 - ABAR[s]) / (1 - ABAR[t]))
        total += b**2 / (2 * variance * a * float(1 - ABAR[t]))
    expected = total * 0.25**2 * 8
    got = path_kl(
        policy, "new", "base", TEXT, None, SamplerConfig(name="ddpm", steps=steps, guidance=1.0), noise()
    )
    assert got == pytest.approx([expected] * 3, rel=1e-9)


def test_flow_path_kl_of_a_constant_shift_is_the_closed_form() -> None:
    """KL = n c^2 sum_t (dt / 2) (1 / s + s (1 - t) / (2 t))^2 with s = 0.7 sqrt(t / (1 - t)), capped at t = 1 by sigmas[1]."""
    policy = ShiftPolicy(Path.flow(), 0.2, {"base": 0.0, "new": 0.3})
    lowest, steps = 1 / 1000, 6
    sigmas = [1 - i * (1 - lowest) / (steps - 1) for i in range(steps)] + [0.0]
    total = 0.0
    for t, following in pairwise(sigmas):
        s = 0.7 * (t / (1 - (sigmas[1] if t == 1 else t))) ** 0.5
        total += (t - following) / 2 * (1 / s + s * (1 - t) / (2 * t)) ** 2
    got = path_kl(
        policy,
        "new",
        "base",
        TEXT,
        None,
        SamplerConfig(name="flow_euler", steps=steps, guidance=1.0),
        noise(),
    )
    assert got == pytest.approx([total * 0.09 * 8] * 3, rel=1e-9)


def test_path_kl_bounds_the_kl_of_the_final_gaussians() -> None:
    """A linear policy's samples are Gaussian; on 1 element the final KL is estimated from moments of many samples."""
    policy = ShiftPolicy(Path.vp(ABAR), 0.2, {"base": 0.0, "new": 0.1})
    sampler = SamplerConfig(name="ddpm", steps=8, guidance=1.0)
    text = Conditioning({"text": torch.zeros(2000, 1)})
    finals = {}
    for name in ("base", "new"):
        with policy.weights.use(name):
            finals[name] = sample(policy, text, None, sampler, noise(2000, (1, 1, 1))).double().flatten()
    p, q = finals["new"], finals["base"]
    final_kl = float(
        (p.var() / q.var() - 1 + (p.mean() - q.mean()) ** 2 / q.var() + torch.log(q.var() / p.var())) / 2
    )
    whole = float(path_kl(policy, "new", "base", text, None, sampler, noise(2000, (1, 1, 1))).mean())
    assert 0 < final_kl < whole


@pytest.mark.parametrize("path", [Path.vp(ABAR), Path.flow()])
def test_equal_versions_are_at_distance_zero_exactly(path: Path) -> None:
    policy = ToyPolicy(path)
    policy.weights.copy("base", "current")
    conditioning, empty = policy.encode_prompts(["a", "b", "c"]), policy.encode_prompts(["", "", ""])
    name = "ddpm" if path.kind == "vp" else "flow_euler"
    sampler = SamplerConfig(name=name, steps=4, guidance=3.0)
    ticks: list[int] = []
    kl = path_kl(
        policy,
        "current",
        "base",
        conditioning,
        empty,
        sampler,
        noise(3, (2, 1, 1)),
        tick=lambda: ticks.append(1),
    )
    assert kl.tolist() == [0.0, 0.0, 0.0] and len(ticks) == 4
    x0 = torch.randn(3, 2, 1, 1, generator=torch_generator(0))
    assert elbo_kl(policy, "current", "base", x0, conditioning, ("k",)).tolist() == [0.0, 0.0, 0.0]


def test_guidance_scales_the_distance_of_the_conditional_half() -> None:
    """With the same constant in both halves, guidance cancels and the KL is that of the plain prediction."""
    policy = ShiftPolicy(Path.vp(ABAR), 0.0, {"base": 0.0, "new": 0.2})
    plain = path_kl(
        policy, "new", "base", TEXT, None, SamplerConfig(name="ddpm", steps=6, guidance=1.0), noise()
    )
    guided = path_kl(
        policy, "new", "base", TEXT, TEXT, SamplerConfig(name="ddpm", steps=6, guidance=7.0), noise()
    )
    assert guided == pytest.approx(plain.tolist(), rel=1e-9)


def test_deterministic_samplers_are_measured_on_the_ancestral_chain() -> None:
    policy = ShiftPolicy(Path.vp(ABAR), 0.1, {"base": 0.0, "new": 0.2})
    one, two = (
        path_kl(policy, "new", "base", TEXT, None, SamplerConfig(name=name, steps=6, guidance=1.0), noise())
        for name in ("ddim", "ddpm")
    )
    assert torch.equal(one, two)
    assert "ancestral" in kl_estimator(policy.path, SamplerConfig(name="ddim", steps=6, guidance=1.0))


@pytest.mark.parametrize("levels", [1, 7, 999])
def test_bound_difference_telescopes_for_a_policy_that_knows_the_image(levels: int) -> None:
    """x0_version = m, x0_reference = m': the sum is n (m - m')^2 (snr(lowest) - snr(highest)) / 2 at any number of levels."""
    path = Path.vp(ABAR, "sample")
    policy = KnownImagePolicy(path, 0.0, {"base": 0.5, "new": 0.2})
    x0 = torch.full((3, *SHAPE), 0.2)
    snr = ABAR / (1 - ABAR)
    expected = 0.5 * float(snr[0] - snr[-1]) * 8 * 0.3**2
    assert elbo_kl(policy, "new", "base", x0, TEXT, ("k",), levels=levels) == pytest.approx(
        [expected] * 3, rel=1e-9
    )
    assert elbo_kl(policy, "base", "new", x0, TEXT, ("k",), levels=levels) == pytest.approx(
        [-expected] * 3, rel=1e-9
    )
