"""Every function of the trajectory methods against a float64 re-derivation in NumPy from the formulas (see `oracle`).

The inputs straddle every clip; none lies within a finite difference of a kink (checked).

Inputs by letter: l log-probs (12,), t those of three steps (3, 12), r ratios or rewards (12,) around 1, a advantages (12,); m
latents (3, 2, 2, 2) and, of that batch of three, s log-probs or advantages, v ratios.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from diffexpo.algorithms import d3po, ddpo, dpok, flow_grpo, prdp, spo
from diffexpo.rng import numpy_generator
from tests.parity.oracle import (
    Array,
    Case,
    assert_gradients_agree,
    assert_half_is_raised,
    assert_values_agree,
)

CLIP, BETA = 0.2, 3.0
MODULES = (d3po, ddpo, dpok, flow_grpo, prdp, spo)
STD = np.array([0.7, 1.3, 2.0])
SIGMA, SIGMA_NEXT = np.array([0.9, 0.5, 0.2]), np.array([0.7, 0.3, 0.05])


def mse(a: Array, b: Array) -> Array:
    return ((a - b) ** 2).reshape(len(a), -1).mean(1)


def surrogate(ratio: Array, advantage: Array) -> Array:
    return np.maximum(-advantage * ratio, -advantage * np.clip(ratio, 1 - CLIP, 1 + CLIP))


def preference(w: Array, l_: Array, wr: Array, lr: Array) -> Array:
    rho_w, rho_l = (np.clip(np.exp(x - ref), 1 - CLIP, 1 + CLIP) for x, ref in ((w, wr), (l_, lr)))
    return BETA * (np.log(rho_w) - np.log(rho_l))


def minus_log_sigmoid(z: Array) -> Array:
    return np.log(1 + np.exp(-z))


def implied(a: Array, b: Array, ar: Array, br: Array) -> Array:
    return BETA * ((a - ar).sum(0) - (b - br).sum(0))


def regression(a: Array, b: Array, ar: Array, br: Array, ao: Array, bo: Array, ra: Array, rb: Array) -> Array:
    near_a, near_b = np.clip(a, ao - CLIP, ao + CLIP), np.clip(b, bo - CLIP, bo + CLIP)
    plain = (implied(a, b, ar, br) - (ra - rb)) ** 2
    held = (implied(near_a, near_b, ar, br) - (ra - rb)) ** 2
    return np.maximum(plain, held)


def guard(lp: Array, old: Array, mean: Array, old_mean: Array) -> Array:
    return np.exp((lp - old + mse(mean, old_mean) / (2 * STD**2)) * STD)


T_STD, T_SIGMA, T_NEXT = (torch.from_numpy(values) for values in (STD, SIGMA, SIGMA_NEXT))
SIGMAS = {"sigma": T_SIGMA, "sigma_next": T_NEXT}
PAIR = {"beta": BETA, "clip_range": CLIP}
CASES = {
    "probability_ratio": Case(ddpo.probability_ratio, lambda lp, old: np.exp(lp) / np.exp(old), "ll", (0,)),
    "clipped_surrogate": Case(
        lambda rho, a: ddpo.clipped_surrogate(rho, a, clip_range=CLIP), surrogate, "ra", (0,)
    ),
    "ddpo_sf_loss": Case(ddpo.ddpo_sf_loss, lambda lp, a: -a * lp, "la", (0,)),
    "ppo_clip_loss": Case(
        lambda lp, old, a: ddpo.ppo_clip_loss(lp, old, a, clip_range=CLIP),
        lambda lp, old, a: surrogate(np.exp(lp - old), a),
        "lla",
        (0,),
    ),
    "dpok_policy_loss": Case(
        lambda lp, old, a: dpok.dpok_policy_loss(lp, old, a, clip_range=CLIP),
        lambda lp, old, a: -a * np.clip(np.exp(lp - old), 1 - CLIP, 1 + CLIP),
        "lla",
        (0,),
    ),
    "dpok_value_loss": Case(dpok.dpok_value_loss, lambda v, r: (v - r) ** 2, "rr", (0,)),
    "dpok_kl eps_mse": Case(dpok.dpok_kl, mse, "mm", (0,)),
    "dpok_kl gaussian": Case(
        lambda mean, ref: dpok.dpok_kl(mean, ref, kind="gaussian", std=T_STD),
        lambda mean, ref: mse(mean, ref) / (2 * STD**2),
        "mm",
        (0,),
    ),
    "transition_margin": Case(
        lambda *four: d3po.transition_margin(*four, **PAIR), preference, "llll", (0, 1)
    ),
    "d3po_loss": Case(
        lambda *four: d3po.d3po_loss(*four, **PAIR),
        lambda *four: minus_log_sigmoid(preference(*four)),
        "llll",
        (0, 1),
    ),
    "spo_loss": Case(
        lambda *four: spo.spo_loss(*four, **PAIR),
        lambda *four: minus_log_sigmoid(preference(*four)),
        "llll",
        (0, 1),
    ),
    "predicted_reward_difference": Case(
        lambda *four: prdp.predicted_reward_difference(*four, beta=BETA), implied, "tttt", (0, 1)
    ),
    "prdp_loss": Case(lambda *eight: prdp.prdp_loss(*eight, **PAIR), regression, "ttttttrr", (0, 1)),
    "flow_grpo_kl": Case(
        lambda mean, ref: flow_grpo.flow_grpo_kl(mean, ref, T_STD, **SIGMAS),
        lambda mean, ref: mse(mean, ref) / (2 * (STD / np.sqrt(SIGMA - SIGMA_NEXT)) ** 2),
        "mm",
        (0,),
    ),
    "guard_ratio": Case(
        lambda lp, old, mean, old_mean: flow_grpo.guard_ratio(lp, old, mean, old_mean, T_STD),
        guard,
        "ssmm",
        (0, 2),
    ),
    "guard_loss": Case(
        lambda rho, a: flow_grpo.guard_loss(rho, a, **SIGMAS, clip_range=CLIP),
        lambda rho, a: surrogate(rho, a) / (SIGMA - SIGMA_NEXT),
        "vs",
        (0,),
    ),
}


def draw(kind: str, generator: np.random.Generator) -> Array:
    return {
        "l": lambda: generator.normal(-1, 0.3, size=12),
        "s": lambda: generator.normal(-1, 0.3, size=3),
        "t": lambda: generator.normal(-1, 0.3, size=(3, 12)),
        "m": lambda: generator.normal(size=(3, 2, 2, 2)),
        "r": lambda: generator.uniform(0.6, 1.4, size=12),
        "v": lambda: generator.uniform(0.6, 1.4, size=3),
        "a": lambda: generator.normal(size=12),
    }[kind]()


def inputs_of(name: str) -> list[Array]:
    generator = numpy_generator("trajectory parity", name)
    return [draw(kind, generator) for kind in CASES[name].inputs]


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    assert_values_agree(CASES[name], inputs_of(name))


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    assert_gradients_agree(CASES[name], inputs_of(name), name)


def test_the_inputs_straddle_every_clip() -> None:
    def sides(values: Array) -> set[int]:
        return set(np.sign(values - np.clip(values, 1 - CLIP, 1 + CLIP)).ravel().tolist())

    assert sides(inputs_of("clipped_surrogate")[0]) == {-1, 0, 1}
    for name in ("ppo_clip_loss", "dpok_policy_loss"):
        lp, old, _ = inputs_of(name)
        assert sides(np.exp(lp - old)) == {-1, 0, 1}
    for name in ("transition_margin", "d3po_loss", "spo_loss"):
        w, l_, wr, lr = inputs_of(name)
        assert sides(np.exp(np.concatenate([w - wr, l_ - lr]))) == {-1, 0, 1}
    a, _, _, _, ao, *_ = inputs_of("prdp_loss")
    assert sides(1 + (a - ao)) == {-1, 0, 1}
    eight = inputs_of("prdp_loss")
    plain = (implied(*eight[:4]) - (eight[6] - eight[7])) ** 2
    chosen = set((regression(*eight) > plain).tolist())
    assert chosen == {True, False}, "both arms of the maximum must be taken"


def test_every_function_is_derived_here() -> None:
    public = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    elsewhere = {
        "mix_grpo_window",
        "spo_min_margin",
    }  # no tensors: tests/identities/test_trajectory_losses.py
    assert public - elsewhere == {name.split(" ")[0] for name in CASES}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_raised_before_any_arithmetic(name: str, half: torch.dtype) -> None:
    assert_half_is_raised(CASES[name], inputs_of(name), half)
