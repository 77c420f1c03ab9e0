"""Double guidance: its exact identities, in one prediction and in whole samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import NoiseSource, double_guidance, sample
from diffexpo.diffusion.guidance import IMAGE_CONDITION, DoubleGuidance, with_image
from diffexpo.diffusion.sampling import Guided, sample_double_guided
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import torch_generator
from diffexpo.types import Conditioning
from tests.unit.algorithms.methods import PATHS

ROWS = 5
SAMPLERS = {
    "vp": [
        SamplerConfig(name="dpmpp", steps=4, guidance=1.0),
        SamplerConfig(name="ddim", steps=4, eta=1.0, guidance=1.0),
    ],
    "flow": [SamplerConfig(name="flow_euler", steps=4, guidance=1.0)],
}


class SeesImages(ToyPolicy):
    """The toy policy plus a part of the image; counts the rows it was asked for."""

    rows = 0

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.rows += len(x_t)
        return super().predict(x_t, t, conditioning) + 0.3 * conditioning.tensors[IMAGE_CONDITION]


def world(kind: str) -> tuple[SeesImages, Tensor, Conditioning, Conditioning, Tensor]:
    policy = SeesImages(PATHS[kind])
    x_t, image = torch.randn(2, ROWS, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    texts = policy.encode_prompts([f"prompt {row}" for row in range(ROWS)])
    return policy, x_t, texts, policy.encode_prompts([""] * ROWS), image


def guided(
    policy: SeesImages,
    x_t: Tensor,
    t: float,
    text: Conditioning,
    empty: Conditioning,
    image: Tensor,
    scales: DoubleGuidance,
) -> Tensor:
    """What every step of `sample_double_guided` asks for."""
    return Guided.by_image_and_text(policy, text, empty, image, scales).predict(x_t, t)


def noise(policy: ToyPolicy) -> NoiseSource:
    return NoiseSource([torch_generator("double", row) for row in range(ROWS)], policy.latent_shape)


@pytest.mark.parametrize("kind", PATHS)
def test_scales_of_1_are_the_conditional_prediction_and_text_0_the_image_alone(kind: str) -> None:
    policy, x_t, texts, empty, image = world(kind)
    t = torch.full((ROWS,), 0.6)
    with torch.no_grad():
        full = policy.predict(x_t, t, with_image(texts, image))
        alone = policy.predict(x_t, t, with_image(empty, image))
        policy.rows = 0
        for scales, expected in ((DoubleGuidance(1.0, 1.0), full), (DoubleGuidance(1.0, 0.0), alone)):
            assert torch.equal(guided(policy, x_t, 0.6, texts, empty, image, scales), expected)
        assert policy.rows == 2 * ROWS  # no forward whose result would be thrown away
        nothing = policy.predict(x_t, t, with_image(empty, torch.zeros_like(image)))
        unguided = guided(policy, x_t, 0.6, texts, empty, image, DoubleGuidance(0.0, 0.0))
    torch.testing.assert_close(unguided, nothing)
    assert not torch.allclose(full, alone) and not torch.allclose(alone, nothing)


def test_three_predictions_in_one_forward_are_the_formula() -> None:
    policy, x_t, texts, empty, image = world("vp")
    t = torch.full((ROWS,), 0.4)
    with torch.no_grad():
        found = guided(policy, x_t, 0.4, texts, empty, image, DoubleGuidance(3.0, 3.5))
        assert policy.rows == 3 * ROWS
        u, i, f = (
            policy.predict(x_t, t, part)
            for part in (with_image(empty, 0 * image), with_image(empty, image), with_image(texts, image))
        )
    torch.testing.assert_close(found, u + 3.0 * (i - u) + 3.5 * (f - i))


def test_the_formula_at_the_ends() -> None:
    u, i, f = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(double_guidance(u, i, f, image_scale=1.0, text_scale=1.0), f)
    torch.testing.assert_close(double_guidance(u, i, f, image_scale=1.0, text_scale=0.0), i)
    assert torch.equal(double_guidance(u, i, f, image_scale=0.0, text_scale=0.0), u)
    assert torch.equal(double_guidance(u, u, u, image_scale=7.0, text_scale=9.0), u)


@pytest.mark.parametrize(("kind", "sampler"), [(kind, s) for kind, list_ in SAMPLERS.items() for s in list_])
def test_a_sample_without_guidance_is_the_conditional_sample_bit_for_bit(
    kind: str, sampler: SamplerConfig
) -> None:
    policy, _, texts, empty, image = world(kind)
    plain = sample(policy, with_image(texts, image), None, sampler, noise(policy))
    ticks: list[int] = []
    double = sample_double_guided(
        policy,
        texts,
        empty,
        image,
        sampler,
        noise(policy),
        DoubleGuidance(1.0, 1.0),
        tick=lambda: ticks.append(1),
    )
    assert torch.equal(double, plain) and len(ticks) == sampler.steps
    strong = sample_double_guided(
        policy, texts, empty, image, sampler, noise(policy), DoubleGuidance(3.0, 3.5)
    )
    assert torch.isfinite(strong).all() and not torch.allclose(strong, plain)


def test_with_image_and_text_alike_classifier_free_guidance_comes_out() -> None:
    # Equal scales leave e(0,0) + s (e(x,c) - e(0,0)): guidance towards both at once.
    policy, _, texts, empty, image = world("vp")
    sampler = SAMPLERS["vp"][0].model_copy(update={"guidance": 2.5})
    both, nothing = with_image(texts, image), with_image(empty, torch.zeros_like(image))
    plain = sample(policy, both, nothing, sampler, noise(policy))
    double = sample_double_guided(
        policy, texts, empty, image, sampler, noise(policy), DoubleGuidance(2.5, 2.5)
    )
    torch.testing.assert_close(double, plain, rtol=1e-4, atol=1e-4)


def test_rows_must_agree() -> None:
    policy, _, texts, empty, image = world("vp")
    with pytest.raises(ValueError, match="4 images and 5 noise"):
        sample_double_guided(
            policy, texts, empty, image[:4], SAMPLERS["vp"][0], noise(policy), DoubleGuidance(3.0, 3.5)
        )
