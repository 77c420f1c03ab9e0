"""Every method on trajectories with a small policy and a batch of transitions that it really drew."""

from __future__ import annotations

import torch
from torch import Tensor

from diffexpo.algorithms import algorithm_class
from diffexpo.config.methods import METHOD_BY_NAME, MethodConfig
from diffexpo.config.schema import SamplerConfig
from diffexpo.diffusion import NoiseSource, sample_trajectory
from diffexpo.policies.toy import ToyPolicy
from diffexpo.rng import torch_generator
from diffexpo.types import Algorithm, Conditioning, TrajectoryBatch, TrajectoryPairBatch
from tests.unit.algorithms.methods import make_policy

IMAGES = 4
# The sampler takes one step more: the last one of this DDIM is certain.
STEPS = 3
SAMPLERS = {
    "vp": SamplerConfig(name="ddim", steps=STEPS + 1, eta=1.0, guidance=2.0),
    "flow": SamplerConfig(name="flow_sde", steps=STEPS + 1, guidance=2.0),
}
# Clips wide enough that some rows are inside and some outside after the policy has moved.
SETTINGS: dict[str, dict[str, object]] = {
    "ddpo": {"clip_range": 0.02},
    "dpok": {"clip_range": 0.02, "reward_weight": 3.0, "kl_weight": 0.5},
    "d3po": {"beta": 2.0, "clip_range": 0.05},
    "spo": {"beta": 2.0, "clip_range": 0.05},
    "prdp": {"beta": 2.0, "clip_range": 0.02},
    "flow_grpo": {"clip_range": 0.02, "kl_weight": 0.5},
}
ON_PAIRS = ("d3po", "spo", "prdp")


def settings_of(name: str, **changes: object) -> MethodConfig:
    return METHOD_BY_NAME[name].model_validate({"type": name} | SETTINGS[name] | changes)


def make(name: str, **changes: object) -> Algorithm:
    return algorithm_class(name)(settings_of(name, **changes))


def moved_policy(kind: str, *, moved: bool = True) -> ToyPolicy:
    """A policy a little away from the base if `moved`; "old" has the base's weights, which draw the batches."""
    policy = make_policy(kind, moved=False)
    if moved:
        generator = torch.Generator().manual_seed(1)
        state = policy.weights.state("current")
        steps = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in state.items()}
        policy.weights.load("current", {name: value + steps[name] for name, value in state.items()})
    return policy


class Drawn:
    """Two trajectories of each of `IMAGES` prompts under the base's weights."""

    def __init__(self, policy: ToyPolicy, sampler: SamplerConfig | None = None) -> None:
        self.sampler = sampler or SAMPLERS[policy.path.kind]
        texts = [f"prompt {row}" for row in range(IMAGES)] * 2
        self.conditioning = policy.encode_prompts(texts)
        self.negative = (
            policy.encode_prompts(["blurry"] * 2 * IMAGES) if self.sampler.guidance != 1.0 else None
        )
        noise = NoiseSource([torch_generator("drawn", row) for row in range(2 * IMAGES)], policy.latent_shape)
        with policy.weights.use("base"):
            self.trajectory = sample_trajectory(policy, self.conditioning, self.negative, self.sampler, noise)

    def rows(self, half: int) -> dict[str, Tensor | Conditioning | None]:
        """The random transitions of one trajectory of each prompt, image after image, from noise to image."""
        images, kept = slice(half * IMAGES, (half + 1) * IMAGES), self.trajectory
        texts = [image for image in range(half * IMAGES, (half + 1) * IMAGES) for _ in range(STEPS)]

        def by_image(values: Tensor) -> Tensor:
            return values[:STEPS, images].transpose(0, 1).flatten(0, 1)

        return {
            "x_t": by_image(kept.latents[:-1]),
            "x_next": by_image(kept.latents[1:]),
            "log_prob": by_image(kept.mean_log_probs),
            "mean": by_image(kept.means),
            "index": torch.arange(STEPS).repeat(IMAGES),
            "conditioning": self.conditioning.select(texts),
            "negative": None if self.negative is None else self.negative.select(texts),
        }


def make_batch(
    name: str, policy: ToyPolicy, sampler: SamplerConfig | None = None
) -> TrajectoryBatch | TrajectoryPairBatch:
    """IMAGES x STEPS rows; weights and advantages differ from row to row, those of a pair's steps agree."""
    drawn = Drawn(policy, sampler)
    generator = torch.Generator().manual_seed(3)
    first, second = drawn.rows(0), drawn.rows(1)
    keys = tuple(f"row {row}" for row in range(IMAGES * STEPS))
    by_image = torch.randn(3, IMAGES, generator=generator).repeat_interleave(STEPS, dim=1)
    if name in ON_PAIRS:
        if name == "spo":  # candidates of one x_t
            second = second | {"x_t": first["x_t"], "x_next": first["x_next"] + 0.1 * second["x_next"]}
        return TrajectoryPairBatch(
            first["x_t"], first["x_next"], second["x_t"], second["x_next"], first["index"],
            first["log_prob"], second["log_prob"], by_image[0], by_image[1], first["conditioning"], keys,
            drawn.sampler, first["negative"], by_image[2].abs(),
            groups=torch.arange(IMAGES).repeat_interleave(STEPS), is_grouped=name == "prdp",
        )  # fmt: skip
    return TrajectoryBatch(
        first["x_t"], first["x_next"], first["index"], first["log_prob"], by_image[0], first["conditioning"],
        keys, drawn.sampler, first["negative"], old_mean=first["mean"], weight=by_image[2].abs(),
    )  # fmt: skip
