"""The toy policy is a whole policy: keyed, seeded, with an invertible picture."""

from __future__ import annotations

import pytest
import torch

from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.policies.toy import TOY_LORA, ToyPolicy


@pytest.mark.parametrize("channels", [2, 8])
def test_picture_is_invertible(channels: int) -> None:
    policy = ToyPolicy(DiffusionPath.flow(1.0), channels=channels)
    latents = torch.randn(5, *policy.latent_shape)
    images = policy.decode_latents(latents)
    visible = min(3, channels)
    assert images.shape == (5, 3, 8, 8)
    torch.testing.assert_close(
        policy.encode_images(images)[:, :visible], latents[:, :visible], rtol=1e-4, atol=1e-4
    )


def test_same_seed_same_weights() -> None:
    path = DiffusionPath.vp(torch.linspace(0.999, 0.01, 100, dtype=torch.float64), "epsilon")
    first, second, other = (ToyPolicy(path, seed=seed, tuning=TOY_LORA) for seed in (1, 1, 2))
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert first.weights.fingerprint("current") == second.weights.fingerprint("current")


def test_prompts_differ_and_the_empty_one_is_zero() -> None:
    policy = ToyPolicy(DiffusionPath.flow(1.0))
    text = policy.encode_prompts(["red", "blue", "red", ""]).tensors["text"]
    assert torch.equal(text[0], text[2]) and not torch.equal(text[0], text[1]) and not text[3].any()
    assert policy.count_tokens(["", "one two"]) == [2, 4]
