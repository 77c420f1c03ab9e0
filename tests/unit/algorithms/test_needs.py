"""Each method says what it needs, runs with that and nothing else, and a run that cannot give it is refused before anything is
spent.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffexpo.algorithms import algorithm_class
from diffexpo.config import RunConfig, load_config
from diffexpo.config.methods import METHOD_BY_NAME
from diffexpo.config.methods.bases import ReferencedConfig, TrajectoryConfig
from diffexpo.config.methods.data import Images, Pairs, TransitionPairs, Transitions
from diffexpo.errors import ConfigError, PolicyError
from diffexpo.online.loaders import LOADERS
from diffexpo.online.stages import STAGES
from diffexpo.policies.toy import ToyPolicy
from diffexpo.types import Algorithm, Batch, PairBatch, ScoredBatch, TrajectoryBatch, TrajectoryPairBatch
from tests.commands import ROOT
from tests.unit.algorithms import methods, trajectories
from tests.unit.algorithms.methods import KEY, PATHS

METHODS = ("expo", *methods.SETTINGS, *trajectories.SETTINGS)
ON_TRAJECTORIES = tuple(trajectories.SETTINGS)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in METHODS},
    "expo without bonus": ("expo", {"alpha": 0.0}),
    "simpo": ("diffusion_dpo", {"kind": "simpo"}),
    "simpo with bonus": ("expo", {"kind": "simpo"}),
    "safeguard": ("diffusion_dpo", {"safeguard": True}),
    "safeguarded simpo": ("diffusion_dpo", {"kind": "simpo", "safeguard": True}),
    "automatic beta": ("diffusion_dpo", {"auto_beta": True}),
    "held to the reference": ("expo", {"anchor_weight": 0.1, "draws": 2}),
    "held to the base": ("spin", {"anchor_weight": 0.1, "reference": "ema"}),
    "proximal": ("diffusion_dpo", {"proximal_weight": 0.5, "reference": "previous"}),
    "simpo held to the guided base": (
        "diffusion_dpo",
        {"kind": "simpo", "anchor_weight": 0.1, "anchor_guidance": 2.0},
    ),
    "nft without kl": ("diffusion_nft", {"kl_weight": 0.0}),
    "awm without kl": ("awm", {"kl_weight": 0.0}),
    "dgpo without clip": ("dgpo", {"clip_range": None}),
    "score function": ("ddpo", {"estimator": "score_function"}),
    "dpok without kl": ("dpok", {"kl_weight": 0.0}),
    "flow_grpo without kl": ("flow_grpo", {"kl_weight": 0.0}),
    "guard": ("flow_grpo", {"ratio": "guard"}),
}


BATCHES = {
    Pairs: PairBatch,
    Images: ScoredBatch,
    Transitions: TrajectoryBatch,
    TransitionPairs: TrajectoryPairBatch,
}


def _is_whole(algorithm: Algorithm) -> bool:
    """Whether a loss must see a whole group of rows at once."""
    data = algorithm.settings.data
    return bool(getattr(data, "whole_groups", False) or getattr(data, "whole_pairs", False))


def scene(
    name: str, changes: dict[str, object], *, moved: bool = False
) -> tuple[ToyPolicy, Batch, Algorithm]:
    """A policy, a batch of the method's kind and the method."""
    if name in ON_TRAJECTORIES:
        policy = trajectories.moved_policy("flow", moved=moved)
        return policy, trajectories.make_batch(name, policy), trajectories.make(name, **changes)
    policy = methods.make_policy("flow", moved=moved)
    if name != "expo":
        return policy, methods.make_batch(name, policy), methods.make(name, policy, **changes)
    pairs = methods.make_batch("diffusion_dpo", policy)
    assert isinstance(pairs, PairBatch)
    batch = replace(
        pairs,
        explored=pairs.loser,
        main=pairs.winner,
        contrast_conditioning=pairs.conditioning,
        contrast_keys=pairs.keys,
    )
    settings = METHOD_BY_NAME["expo"].model_validate({"type": "expo", "beta": 30.0, "alpha": 0.5} | changes)
    return policy, batch, algorithm_class("expo")(settings, policy.encode_prompts([""]))


@pytest.mark.parametrize("name", METHOD_BY_NAME)
def test_every_method_declares_what_it_needs(name: str) -> None:
    algorithm = algorithm_class(name)(METHOD_BY_NAME[name](), ToyPolicy(PATHS["vp"]).encode_prompts([""]))
    card = algorithm.settings
    assert card == METHOD_BY_NAME[name]() and type(card.data) in BATCHES
    assert set(card.versions) <= {"reference", "old"}
    assert card.group_size >= 1
    assert card.initial_loss is None or isinstance(card.initial_loss, float)
    # A setting of the reference where there may be one, and only there.
    assert isinstance(card, ReferencedConfig) or not card.needs_reference


@pytest.mark.parametrize("name", METHOD_BY_NAME)
def test_every_method_has_a_loop_that_gives_its_batches(name: str) -> None:
    card = METHOD_BY_NAME[name]()
    assert type(card.data) in LOADERS
    assert (
        card.draws_first
        is isinstance(card, TrajectoryConfig)
        is isinstance(card.data, Transitions | TransitionPairs)
    )
    assert {*card.first_stages, *card.stages} <= {*STAGES, "evaluate"}


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_a_method_looks_at_the_versions_it_says(name: str, changes: dict[str, object]) -> None:
    policy, batch, algorithm = scene(name, changes)
    assert isinstance(batch, BATCHES[type(algorithm.settings.data)])
    used: set[str] = set()
    inner = policy.weights.use
    policy.weights.use = lambda version: used.add(version) or inner(version)
    output = algorithm.loss(policy, batch, KEY)
    needed = {"current"}
    needed |= {"reference"} if algorithm.settings.needs_reference else set()
    needed |= {"old"} if algorithm.settings.needs_old_policy else set()
    needed |= {algorithm.settings.anchor_version} - {None}
    assert used == needed
    slopes = methods.gradients(policy, output.loss)
    assert all(torch.isfinite(slope).all() for slope in slopes.values())
    assert any(bool((slope != 0).any()) for slope in slopes.values())


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS.keys())
def test_no_gradient_and_no_change_reaches_another_version(name: str, changes: dict[str, object]) -> None:
    policy, batch, algorithm = scene(name, changes, moved=True)
    before = {version: policy.weights.fingerprint(version) for version in policy.weights.names()}
    algorithm.loss(policy, batch, KEY).loss.backward()
    for version in policy.weights.names():
        with policy.weights.use(version):
            gradients = [parameter.grad for parameter in policy.weights.network.parameters()]
        assert (version == "current") is any(gradient is not None for gradient in gradients), version
    assert {version: policy.weights.fingerprint(version) for version in policy.weights.names()} == before


@pytest.mark.parametrize(
    "name", [name for name in METHODS if issubclass(METHOD_BY_NAME[name], ReferencedConfig)]
)
def test_a_reference_that_was_never_set_is_the_base(name: str) -> None:
    losses = []
    for sets_it in (False, True):
        policy, batch, algorithm = scene(name, {}, moved=True)
        assert algorithm.settings.needs_reference or name == "awm"
        if sets_it:
            policy.weights.copy("base", "reference")
        losses.append(algorithm.loss(policy, batch, KEY).loss)
    assert torch.equal(*losses)
    policy, batch, algorithm = scene(name, {})
    if algorithm.settings.initial_loss is not None:
        plain = replace(batch, weight=None)
        assert float(algorithm.loss(policy, plain, KEY).loss.detach()) == pytest.approx(
            algorithm.settings.initial_loss, abs=1e-6
        )


@pytest.mark.parametrize("name", ["diffusion_nft", "awm", "dgpo"])
def test_an_old_policy_that_was_never_set_is_missed_by_its_name(name: str) -> None:
    policy, batch, algorithm = scene(name, {})
    policy.weights.drop("old")
    assert algorithm.settings.needs_old_policy
    with pytest.raises(PolicyError, match="'old': no such version"):
        algorithm.loss(policy, batch, KEY)


def test_only_these_methods_need_an_old_policy_or_old_means() -> None:
    made = {variant: scene(*VARIANTS[variant])[2] for variant in VARIANTS}
    old = {variant for variant, algorithm in made.items() if algorithm.settings.needs_old_policy}
    assert old == {"diffusion_nft", "nft without kl", "awm", "awm without kl", "dgpo"}
    means = {
        variant
        for variant, algorithm in made.items()
        if getattr(algorithm.settings.data, "needs_means", False)
    }
    assert means == {"guard"}
    groups = {variant for variant, algorithm in made.items() if _is_whole(algorithm)}
    assert groups == {"dgpo", "dgpo without clip", "prdp"}


# ---- before anything is spent ------------------------------------------------------------------------------

OWN = ["offline.source=null", "explore.agents=1", "hybrid.decay=0"]
TRAJECTORY = ["offline.source=null", "explore.sampler.name=ddim", "explore.sampler.eta=1.0"]
VALID: dict[str, list[str]] = {
    **{name: [] for name in METHODS},
    "rwr": ["offline.source=null"],
    "diffusion_nft": OWN,
    "awm": OWN,
    "spin": ["explore.agents=1", "hybrid={offline_weight: 0, decay: 0}"],
    "guidance_distillation": ["explore.agents=1"],
    **{name: TRAJECTORY for name in ON_TRAJECTORIES},
    "flow_grpo": [*TRAJECTORY, "algorithm.kl=exact"],
    "python": [f"algorithm.path={ROOT}/tests/own_losses.py:dpo"],
}


def load(name: str, *overrides: str) -> RunConfig:
    return load_config([], [f"algorithm.type={name}", *VALID[name], *overrides], {}).config


@pytest.mark.parametrize("name", METHODS)
def test_the_smallest_run_of_a_method_passes(name: str) -> None:
    size, drawers = METHOD_BY_NAME[name].group_size, 1 if name in ON_TRAJECTORIES else 2
    load(name, f"explore.images_per_prompt={-(-size // drawers)}")


@pytest.mark.parametrize("name", ["d3po", "prdp", "flow_grpo"])
def test_one_image_of_a_prompt_is_refused_before_a_model_is_looked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.type = {name} compares 2 or more"):
        own = ["model.path=/nowhere/at/all", "prompts.source=a.txt", "evaluation.prompts=b.txt"]
        load(name, "explore.images_per_prompt=1", *own)
    assert {method for method in ON_TRAJECTORIES if METHOD_BY_NAME[method].group_size > 1} == {
        "d3po",
        "prdp",
        "flow_grpo",
    }


@pytest.mark.parametrize(
    "sampler",
    [
        ["explore.sampler.name=ddim", "explore.sampler.eta=0"],
        ["explore.sampler.name=dpmpp"],
        ["explore.sampler.name=flow_euler"],
        ["explore.sampler.name=flow_sde", "explore.sampler.noise_level=0"],
    ],
    ids=lambda sampler: " ".join(sampler),
)
@pytest.mark.parametrize("name", ON_TRAJECTORIES)
def test_a_sampler_without_density_is_refused_by_every_method_on_trajectories(
    name: str, sampler: list[str]
) -> None:
    with pytest.raises(ConfigError, match=rf"algorithm\.type = {name}: the kernel has no density"):
        load(name, *sampler)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_without_what_a_method_learns_from_is_refused(name: str) -> None:
    if name in ON_TRAJECTORIES:
        with pytest.raises(ConfigError, match="offline images have none"):
            load(name, "offline.source=emoji:offline")
    else:
        reason = "winners are images of a data set" if name == "spin" else "nothing to learn from"
        with pytest.raises(ConfigError, match=reason):
            load(name, "offline.source=null", "explore.iterations=1")
    if name in ("spin", "guidance_distillation"):  # learn from data and from the base, not from rewards
        load(name, "rewards=[]")
        return
    with pytest.raises(ConfigError, match="rewards holds no reward with role: train"):
        load(name, "rewards=[]")


def test_every_method_is_here() -> None:
    # The improvement model's method is Diffusion-DPO on pairs of its own: its tests are with that model.
    assert set(METHODS) | {"improvement_dpo"} >= set(METHOD_BY_NAME)
