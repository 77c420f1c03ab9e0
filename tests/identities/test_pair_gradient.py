"""The gradient of a loss on pairs in two halves is that of the joint forward, for every loss on pairs.

Both sides sum the same terms in another order. In float64 that costs about eps x (the terms of a sum, some
hundreds) x (how much larger a term is than the sum: ipo and the automatic beta multiply differences of errors
by up to 5000), below 1e-11.
"""

from __future__ import annotations

import pytest
import torch

from diffexpo.algorithms import algorithm_class
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.types import LearnsInParts
from tests.unit.algorithms.methods import (
    KEY,
    PATHS,
    ROWS,
    gradients,
    make,
    make_batch,
    make_policy,
)

pytestmark = pytest.mark.usefixtures("float64")
BOUND = 1e-11

LOSSES = {
    "sigmoid": ("diffusion_dpo", {}),
    "hinge": ("diffusion_dpo", {"kind": "hinge"}),
    "ipo": ("diffusion_dpo", {"kind": "ipo"}),
    "robust": ("diffusion_dpo", {"kind": "robust", "label_smoothing": 0.2}),
    "simpo": ("diffusion_dpo", {"kind": "simpo", "simpo_gamma": 0.3}),
    "linear": ("diffusion_dpo", {"kind": "linear"}),
    "anchor": ("diffusion_dpo", {"sft_weight": 2.0}),
    "safeguard": ("diffusion_dpo", {"safeguard": True}),
    "automatic beta": ("diffusion_dpo", {"beta": 5000.0, "auto_beta": True}),
    "several draws": ("diffusion_dpo", {"draws": 3, "safeguard": True}),
    "held to the base": ("diffusion_dpo", {"anchor_weight": 2.0, "auto_beta": True}),
    "held to the guided base": (
        "spin",
        {"draws": 2, "reference": "previous", "anchor_weight": 2.0, "anchor_guidance": 3.0},
    ),
    "held at one of three draws": (
        "diffusion_dpo",
        {"draws": 3, "anchor_draws": 1, "anchor_weight": 2.0, "anchor_guidance": 3.0},
    ),
    "held to the reference": ("spin", {"draws": 2, "proximal_weight": 2.0}),
    "held to both": (
        "diffusion_dpo",
        {"draws": 2, "anchor_draws": 1, "anchor_weight": 2.0, "proximal_weight": 1.0, "auto_beta": True},
    ),
    "spin": ("spin", {}),
    "mapo": ("mapo", {}),
    "orpo": ("orpo", {"weight": 2.0}),
    "python": ("python", {}),
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(("name", "changes"), LOSSES.values(), ids=LOSSES.keys())
def test_two_halves_are_the_joint_gradient(name: str, changes: dict[str, object], kind: str) -> None:
    policy = make_policy(kind)
    batch, algorithm = make_batch(name, policy), make(name, policy, **changes)
    joint = algorithm.loss(policy, batch, KEY)
    expected = gradients(policy, joint.loss)
    rows = []
    inner = policy.predict

    def counted(x_t, t, conditioning):
        rows.append((len(x_t), torch.is_grad_enabled()))
        return inner(x_t, t, conditioning)

    policy.predict = counted
    assert isinstance(algorithm, LearnsInParts)
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    value, metrics = 0.0, {}
    for output in algorithm.loss_in_parts(policy, batch, KEY):
        for key, slope in gradients(policy, output.loss).items():
            found[key] += slope
        value += float(output.loss.detach())
        metrics |= output.metrics
    assert value == pytest.approx(float(joint.loss.detach()), rel=BOUND)
    assert metrics.keys() == joint.metrics.keys()
    # The graph of one half at a time.
    assert [count for count, has_gradient in rows if has_gradient] == [ROWS * algorithm.settings.draws] * 2
    scale = max(float(slope.abs().max()) for slope in expected.values())
    for key, slope in expected.items():
        assert float((found[key] - slope).abs().max()) <= BOUND * scale, key


def test_the_bonus_of_expo_is_in_the_parts_too() -> None:
    policy = make_policy()
    pairs = make_batch("diffusion_dpo", policy)
    generator = torch.Generator().manual_seed(5)
    explored, main = torch.randn(2, 3, *policy.latent_shape, generator=generator)
    batch = type(pairs)(
        pairs.winner, pairs.loser, pairs.conditioning, pairs.keys, pairs.weight,
        explored=explored, main=main, contrast_conditioning=pairs.conditioning.select(slice(0, 3)),
        contrast_keys=("a", "b", "c"),
    )  # fmt: skip
    settings = ExpoConfig(beta=30.0, alpha=0.7, empty_prompt_fraction=0.5)
    algorithm = algorithm_class("expo")(settings, policy.encode_prompts([""]))
    joint = algorithm.loss(policy, batch, KEY)
    outputs = [
        (gradients(policy, output.loss), float(output.loss.detach()), output.metrics)
        for output in algorithm.loss_in_parts(policy, batch, KEY)
    ]
    assert len(outputs) == 4
    assert sum(value for _, value, _ in outputs) == pytest.approx(float(joint.loss.detach()), rel=BOUND)
    assert {name for _, _, metrics in outputs for name in metrics} == set(joint.metrics)
    for key, slope in gradients(policy, joint.loss).items():
        total = sum(found[key] for found, _, _ in outputs)
        torch.testing.assert_close(total, slope, rtol=0, atol=BOUND * float(slope.abs().max()))
