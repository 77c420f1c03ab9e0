"""Guidance distillation in the outer loop itself: afterwards a toy policy draws without guidance what its base draws with it.

The base knows half of the prompts to lie at -1 and half at +1 on the first axis; guidance exaggerates that.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffexpo.config import RunConfig
from diffexpo.data.latents import PromptEmbeddings
from diffexpo.diffusion import Path as DiffusionPath
from diffexpo.diffusion import add_noise
from diffexpo.diffusion.sampling import sample
from diffexpo.online.loop import run as run_loop
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyNetwork, ToyPolicy
from diffexpo.policies.weights import make_weights
from diffexpo.rng import torch_generator
from tests.learning.toy import PATHS, PROMPTS, SAMPLERS, TUNINGS, Rows, make_loop

V = DiffusionPath.vp(torch.linspace(0.9995, 0.98, 200).cumprod(0), "v_prediction")
MODELS = PATHS | {"v": V}
G = 2.5
SIDES = {prompt.text: 1.0 if index % 2 else -1.0 for index, prompt in enumerate(PROMPTS)}


@cache
def two_sided(kind: str, steps: int = 600) -> dict[str, Tensor]:
    """Weights of a toy network fitted to N(side of the prompt, 0.5^2); the empty prompt has both sides."""
    path, network = MODELS[kind], ToyNetwork(2, 32, 0)
    table = ToyPolicy(path).encode_prompts(["", *SIDES]).tensors["text"]
    sides = torch.tensor([0.0, *SIDES.values()])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch_generator("two sided", kind)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 2.0 * (1 - step / steps))
        rows = torch.randint(1, len(table), (256,), generator=generator)
        x0, eps = torch.randn(2, 256, 2, 1, 1, generator=generator)
        x0 = 0.5 * x0
        x0[:, 0, 0, 0] += sides[rows]
        rows[torch.rand(256, generator=generator) < 0.2] = 0
        t = path.training_t(256, generator)
        target = path.target(x0, eps, t.double())
        x_t = add_noise(x0, eps, *path.alpha_sigma(t.double()))
        loss = (network(x_t.float(), t.float(), table[rows]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def make_policy(kind: str, tuning: str) -> ToyPolicy:
    policy = ToyPolicy(MODELS[kind], tuning=TUNINGS[tuning])
    network = ToyNetwork(2, 32, 0)
    network.load_state_dict(two_sided(kind))
    policy.weights = make_weights(network, TUNINGS[tuning], 0)
    return policy


def sampler_of(kind: str, guidance: float) -> dict[str, object]:
    """Without noise of its own, so that images from one noise differ by the predictions alone."""
    name = "flow_euler" if kind == "flow" else "ddim"
    return SAMPLERS["vp"].model_dump() | {"name": name, "eta": 0.0, "guidance": guidance}


def draw(policy: ToyPolicy, kind: str, version: str, guidance: float, count: int = 1024) -> Tensor:
    """Latents (count, 2) from the same noise whoever draws, over all prompts in turn."""
    embeddings, texts = PromptEmbeddings(policy), [PROMPTS[row % 24].text for row in range(count)]
    empty = None if guidance == 1 else embeddings.select([""] * count)
    settings = type(SAMPLERS["vp"]).model_validate(sampler_of(kind, guidance))
    with policy.weights.use(version):
        return sample(policy, embeddings.select(texts), empty, settings, Rows(count, 0))[:, :, 0, 0]


def config(kind: str, tuning: str, **changes: dict[str, object]) -> RunConfig:
    groups: dict[str, dict[str, object]] = {
        "explore": {
            "iterations": 2,
            "prompts_per_iteration": 96,
            "images_per_prompt": 2,
            "agents": 1,
            "sampler": sampler_of(kind, G),
            "negatives": {"source": None},
        },
        "training": {
            "steps": 150,
            "batch_size": 64,
            "micro_batch_size": 64,
            "learning_rate": 3e-3 if tuning == "full" else 1e-2,
            "weight_decay": 0.0,
        },
        "offline": {"source": None},
        "tuning": TUNINGS[tuning].model_dump(),
        "algorithm": {"type": "guidance_distillation", "guidance": G},
    }
    for name, values in changes.items():
        groups[name] = groups[name] | values
    return RunConfig.model_validate({**groups, "rewards": []})


def distil(kind: str, tuning: str, folder: Path, **changes: dict[str, object]) -> ToyPolicy:
    policy = make_policy(kind, tuning)
    loop = make_loop(config(kind, tuning, **changes), policy, folder)
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    return policy


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_distilled_policy_draws_without_guidance_what_the_base_draws_with_it(
    kind: str, tuning: str, tmp_path: Path
) -> None:
    policy = distil(kind, tuning, tmp_path / "run")
    plain, guided = (draw(policy, kind, "base", guidance) for guidance in (1.0, G))
    distilled = draw(policy, kind, "current", 1.0)
    far, left = ((images - guided).square().mean().sqrt() for images in (plain, distilled))
    assert far > 0.3  # guidance does something
    assert left < 0.35 * far
    # Guidance on top of it goes further than the base's own.
    twice = draw(policy, kind, "current", G)
    side = torch.tensor([SIDES[PROMPTS[row % 24].text] for row in range(len(twice))])
    assert float((side * (twice - guided)[:, 0]).mean()) > 0.1


def test_given_images_serve_as_well_and_their_labels_do_not_matter(tmp_path: Path) -> None:
    """As in the paper, x_t is made of images of a data set: here those of D_off."""
    given = {"explore": {"iterations": 1}, "offline": {"source": "emoji:offline"}}
    policy = distil("flow", "full", tmp_path / "run", **given)
    plain, guided = (draw(policy, "flow", "base", guidance) for guidance in (1.0, G))
    distilled = draw(policy, "flow", "current", 1.0)
    assert (distilled - guided).square().mean().sqrt() < 0.5 * (plain - guided).square().mean().sqrt()


def test_the_base_draws_in_every_iteration(tmp_path: Path) -> None:
    policy = make_policy("flow", "full")
    loop = make_loop(config("flow", "full", explore={"iterations": 3}), policy, tmp_path / "run")
    run_loop(loop, {**STAGES, "evaluate": lambda loop, iteration: None})
    for iteration in (1, 2):
        rows = loop.store.collected(iteration)
        assert len(rows) == 96 * 4 and {row.agent for row in rows} == {"base"}
        assert {row.weights for row in rows} == {policy.weights.fingerprint("base")}
        assert {row.sampler_settings["guidance"] for row in rows} == {G}
    assert policy.weights.fingerprint("current") != policy.weights.fingerprint("base")
    assert [stage for stage, _ in loop.store.completed() if stage == "pair"] == []
