"""Losses on scored or single images, and the pair safeguards, against a float64 re-derivation in NumPy (see `oracle`).

Where the loss holds a part of itself fixed (a stopped gradient), the differences are taken of the truth with that part held.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo.algorithms import (
    awm,
    dgpo,
    diffusion_kto,
    diffusion_nft,
    guidance_distillation,
    mapo,
    orpo,
    rwr,
    safeguards,
    sft,
    spin,
)
from diffexpo.rng import numpy_generator
from tests.parity.oracle import (
    Array,
    Case,
    assert_gradients_agree,
    assert_half_is_raised,
    assert_values_agree,
    logsig,
)

MODULES = (
    awm,
    dgpo,
    diffusion_kto,
    diffusion_nft,
    guidance_distillation,
    mapo,
    orpo,
    rwr,
    safeguards,
    sft,
    spin,
)
# No tensors: tests/identities/test_scored_losses.py.
ELSEWHERE = {"old_policy_decay"}

DESIRABLE = np.array([True, False, False, True, False])
GROUPS = np.array([7, 3, 7, 3, 3])
TIMES = np.array([0.9, 0.7, 0.5, 0.3, 0.1])
BETA = 40.0


def per_sample(x: Array) -> Array:
    return x.reshape(len(x), -1).mean(1)


def kto(utility: str) -> Case:
    y, weight = np.where(DESIRABLE, 1, -1), np.where(DESIRABLE, 0.7, 1.4)

    def truth(e: Array, er: Array) -> Array:
        g = er - e - 0.01
        a = y * BETA * g
        u = {
            "sigmoid": 1 / (1 + np.exp(-a)),
            "loss_averse": logsig(a),
            "risk_seeking_1": -y * logsig(-BETA * g),
            "risk_seeking_2": y * np.exp(BETA * g / 100) - 1,
            "risk_seeking_3": -logsig(-a),
        }[utility]
        return weight * (1 - u)

    return Case(
        lambda e, er: diffusion_kto.diffusion_kto_loss(
            e,
            er,
            torch.from_numpy(DESIRABLE),
            beta=BETA,
            baseline=0.01,
            utility=utility,
            desirable_weight=0.7,
            undesirable_weight=1.4,
        ),
        truth,
        "ee",
        (0,),
    )


def baseline(kind: str, sign: float) -> Case:
    def truth(e: Array, er: Array) -> Array:
        g = sign * (er - e)
        if kind == "mean":
            return np.array([max(0.0, g.mean())])
        return np.array([(g[DESIRABLE].mean() + g[~DESIRABLE].mean()) / 2])

    def ours(e: Tensor, er: Tensor) -> Tensor:
        pair = (e, er) if sign > 0 else (er, e)
        return diffusion_kto.kto_baseline(*pair, torch.from_numpy(DESIRABLE), kind=kind)[None]

    return Case(ours, truth, "ee", ())


def phi(e: Array, s: float) -> Array:
    return s * e / np.expm1(s * e)


def mapo_case(shift: float, steps: int) -> Case:
    return Case(
        lambda w, l_: mapo.mapo_loss(w, l_, beta=0.5, shift=shift, num_train_timesteps=steps),
        lambda w, l_: w - 0.5 * logsig(steps * (phi(w, shift) - phi(l_, shift))),
        "ee",
        (0, 1),
    )


def log_odds_ratio(winner: Array, loser: Array, beta: float) -> Array:
    """From the likelihoods themselves."""
    odds = [p / (1 - p) for p in (np.exp(-beta * winner), np.exp(-beta * loser))]
    return np.log(odds[0]) - np.log(odds[1])


def orpo_case(beta: float) -> Case:
    return Case(
        lambda w, l_: orpo.orpo_loss(w, l_, beta=beta, weight=0.3),
        lambda w, l_: w - 0.3 * logsig(log_odds_ratio(w, l_, beta)),
        "ee",
        (0, 1),
    )


def nft(beta: float) -> Case:
    def parts(v: Array, old: Array, x0: Array, x_t: Array, t: Array) -> tuple[Array, Array]:
        wide = t.reshape(-1, 1, 1, 1)
        plus = x_t - wide * (beta * v + (1 - beta) * old) - x0
        minus = x_t - wide * ((1 + beta) * old - beta * v) - x0
        return plus, minus

    def held(*base: Array) -> Callable[..., Array]:
        norms = [np.maximum(per_sample(abs(part)), 1e-5) for part in parts(*base[:5])]

        def truth(v: Array, old: Array, x0: Array, x_t: Array, t: Array, r: Array) -> Array:
            plus, minus = parts(v, old, x0, x_t, t)
            return (
                r * per_sample(plus**2) / norms[0] / beta + (1 - r) * per_sample(minus**2) / norms[1] / beta
            )

        return truth

    return Case(
        lambda *x: diffusion_nft.nft_loss(*x, beta=beta),
        lambda *x: held(*x)(*x),
        "xxxxtt",
        (0, 2, 3, 4),
        held,
    )


def optimality(mode: str) -> Case:
    def truth(a: Array) -> Array:
        clipped = np.clip(a, -1.5, 1.5)
        changed = {
            "all": clipped,
            "positive_only": np.maximum(clipped, 0),
            "negative_only": np.minimum(clipped, 0),
            "one_only": np.where(clipped > 0, 1.0, 0.0),
            "binary": np.sign(clipped),
        }[mode]
        return np.clip(changed / 1.5 / 2 + 0.5, 0, 1)

    return Case(lambda a: diffusion_nft.nft_optimality(a, clip=1.5, mode=mode), truth, "a", ())


def shaped(weighting: str) -> Callable[[Array], Array]:
    return {
        "uniform": lambda e: e,
        "t": lambda e: TIMES * e,
        "t_squared": lambda e: TIMES**2 * e,
        "huber": lambda e: TIMES * (np.sqrt(e + 1e-10) - 1e-5),
        "ghuber": lambda e: TIMES * ((e + 1e-10) ** 0.3 - 1e-3) / 0.3,
    }[weighting]


def awm_case(weighting: str) -> Case:
    cost = shaped(weighting)

    def truth(e: Array, old: Array, a: Array) -> Array:
        rho = np.exp(cost(old) - cost(e))
        return np.maximum(-a * rho, -a * np.clip(rho, 0.95, 1.05))

    return Case(
        lambda e, old, a: awm.awm_loss(
            e, old, a, torch.from_numpy(TIMES), clip_range=0.05, weighting=weighting, power=0.3
        ),
        truth,
        "eea",
        (0,),
    )


def awm_log_prob(weighting: str) -> Case:
    cost = shaped(weighting)
    return Case(
        lambda e: awm.awm_log_prob(e, torch.from_numpy(TIMES), weighting=weighting, power=0.3),
        lambda e: -cost(e),
        "e",
        (0,),
    )


def group_margin(e: Array, er: Array, a: Array) -> Array:
    out = np.zeros(len(e))
    for group in np.unique(GROUPS):
        of = GROUPS == group
        out[of] = -BETA * (a[of] * (e[of] - er[of])).mean()
    return out


def group_loss(e: Array, er: Array, a: Array) -> Array:
    return -logsig(group_margin(e, er, a))


def clipped_dgpo() -> Case:
    def held(base: Array, *others: Array) -> Callable[..., Array]:
        a, old = others[1], others[2]
        rho = np.exp(old - base)
        stopped = np.where(a > 0, rho > 1.03, rho < 0.97)
        assert 0 < stopped.sum() < len(base)
        return lambda e, er, a, old: group_loss(np.where(stopped, base, e), er, a)

    return Case(
        lambda e, er, a, old: dgpo.dgpo_loss(
            e, er, a, torch.from_numpy(GROUPS), beta=BETA, error_old=old, clip_range=0.03
        ),
        lambda e, er, a, old: group_loss(e, er, a),
        "eeae",
        (0,),
        held,
    )


def scale(winner: Array, loser: Array) -> Array:
    out = []
    for w, l_ in zip(winner, loser, strict=True):
        conflict = float((w * l_).sum())
        out.append(min(1.0, 0.4 * float((w * w).sum()) / conflict) if conflict > 0 else 1.0)
    return np.array(out)


CASES = {
    "sft_loss": Case(sft.sft_loss, lambda e: e, "e", (0,)),
    "sft_loss weighted": Case(sft.sft_loss, lambda e, w: w * e, "ee", (0,)),
    "guidance_distillation_loss": Case(
        lambda *x: guidance_distillation.guidance_distillation_loss(*x, guidance=2.5),
        lambda v, u, c: per_sample((v - (2.5 * c - 1.5 * u)) ** 2),
        "xxx",
        (0,),
    ),
    "rwr_weights exponential": Case(
        lambda r: rwr.rwr_weights(r, temperature=0.3),
        lambda r: len(r) * np.exp(r / 0.3) / np.exp(r / 0.3).sum(),
        "a",
        (),
    ),
    "rwr_weights sparse": Case(
        lambda r: rwr.rwr_weights(r, kind="sparse", percentile=60),
        lambda r: len(r) * (r >= np.percentile(r, 60)) / (r >= np.percentile(r, 60)).sum(),
        "a",
        (),
    ),
    "spin_loss": Case(
        lambda *e: spin.spin_loss(*e, beta=BETA),
        lambda d, g, dr, gr: np.log1p(np.exp(BETA / 2 * ((d - dr) - (g - gr)))),
        "eeee",
        (0, 1),
    ),
    **{f"diffusion_kto_loss {utility}": kto(utility) for utility in diffusion_kto.UTILITIES},
    "kto_baseline mean": baseline("mean", 1.0),
    "kto_baseline mean swapped": baseline("mean", -1.0),
    "kto_baseline class_mean": baseline("class_mean", 1.0),
    "mapo_loss": mapo_case(0.5, 100),
    "mapo_loss wide": mapo_case(4.0, 10),
    "mapo_margin": Case(
        lambda w, l_: mapo.mapo_margin(w, l_, shift=4.0, num_train_timesteps=10),
        lambda w, l_: 10 * (phi(w, 4.0) - phi(l_, 4.0)),
        "ee",
        (0, 1),
    ),
    "orpo_loss": orpo_case(1.0),
    "orpo_loss sharp": orpo_case(40.0),
    "orpo_margin": Case(
        lambda w, l_: orpo.orpo_margin(w, l_, beta=3.0),
        lambda w, l_: log_odds_ratio(w, l_, 3.0),
        "ee",
        (0, 1),
    ),
    "mapo_score": Case(lambda e: mapo.mapo_score(e, shift=4.0), lambda e: phi(e, 4.0), "e", (0,)),
    "nft_loss": nft(1.0),
    "nft_loss short": nft(0.1),
    **{f"nft_optimality {mode}": optimality(mode) for mode in diffusion_nft.MODES},
    **{f"awm_loss {weighting}": awm_case(weighting) for weighting in awm.WEIGHTINGS},
    **{f"awm_log_prob {weighting}": awm_log_prob(weighting) for weighting in awm.WEIGHTINGS},
    "dgpo_loss": Case(
        lambda *x: dgpo.dgpo_loss(*x, torch.from_numpy(GROUPS), beta=BETA), group_loss, "eea", (0,)
    ),
    "dgpo_loss clipped": clipped_dgpo(),
    "dgpo_margin": Case(
        lambda *x: dgpo.dgpo_margin(*x, torch.from_numpy(GROUPS), beta=BETA), group_margin, "eea", (0,)
    ),
    "safeguard_scale": Case(lambda w, l_: safeguards.safeguard_scale(w, l_, mu=0.6), scale, "xx", ()),
    "safeguarded_loser": Case(
        safeguards.safeguarded_loser,
        lambda e, share: e,
        "et",
        (0,),
        lambda base, _: lambda e, share: base + share * (e - base),
    ),
    "auto_beta": Case(
        lambda m: safeguards.auto_beta(m, target=0.1)[None],
        lambda m: np.array([np.log(9) / abs(m).mean()]),
        "a",
        (),
    ),
}


def inputs_of(name: str) -> list[Array]:
    """x latents, e errors, a advantages or signed numbers, t times or shares; rows that fit together."""
    generator, rows = numpy_generator("parity", name), 3 if "x" in CASES[name].inputs else 5
    draw = {
        "x": lambda: generator.normal(size=(rows, 2, 2, 2)),
        "e": lambda: generator.uniform(0.05, 0.2, size=rows),
        "a": lambda: generator.normal(size=rows),
        "t": lambda: generator.uniform(0.1, 0.9, size=rows),
    }
    return [draw[kind]() for kind in CASES[name].inputs]


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    assert_values_agree(CASES[name], inputs_of(name))


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    assert_gradients_agree(CASES[name], inputs_of(name), name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_any_arithmetic(name: str, half: torch.dtype) -> None:
    assert_half_is_raised(CASES[name], inputs_of(name), half)


def test_every_public_function_is_derived_here() -> None:
    derived = {name.split(" ")[0] for name in CASES}
    public = {
        name
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public == derived | ELSEWHERE
