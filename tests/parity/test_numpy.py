"""The kernels, and Diffusion-DPO and EXPO, against a float64 re-derivation in NumPy from the formulas (see `oracle`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffexpo import algorithms, diffusion
from diffexpo.rng import numpy_generator
from tests.parity.oracle import Array, Case, assert_gradients_agree, assert_values_agree, logsig

A_T, S_T = np.array([0.9, 0.6, 0.2]), np.sqrt(1 - np.array([0.9, 0.6, 0.2]) ** 2)
A_S, S_S = np.array([0.95, 0.8, 0.5]), np.sqrt(1 - np.array([0.95, 0.8, 0.5]) ** 2)
SIG, SIG_NEXT = np.array([0.9, 0.5, 0.2]), np.array([0.7, 0.3, 0.05])
STD = np.array([0.7, 1.3, 2.0])


def wide(values: Array) -> Array:
    return values.reshape(-1, 1, 1, 1)


def margin(w: Array, l_: Array, wr: Array, lr: Array, beta: float = 40.0) -> Array:
    return -(beta / 2) * ((w - wr) - (l_ - lr))


def error(p: Array, q: Array) -> Array:
    return ((p - q) ** 2).reshape(len(p), -1).mean(1)


def ddim_numbers(eta: float) -> tuple[Array, Array]:
    abar_t, abar_s = A_T**2, A_S**2
    std = eta * np.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
    return std, np.sqrt(1 - abar_s - std**2)


def ddim(eta: float) -> Case:
    std, direction = ddim_numbers(eta)
    scales = {"alpha_t": A_T, "sigma_t": S_T, "alpha_s": A_S, "sigma_s": S_S}
    return Case(
        lambda x0, eps: joined(diffusion.ddim_transition(x0, eps, **tensors(scales), eta=eta)),
        lambda x0, eps: joined_array(wide(A_S) * x0 + wide(direction) * eps, std),
        "xx",
        (0, 1),
    )


def flow_sde(kind: str, level: float) -> Case:
    dt = SIG_NEXT - SIG

    def truth(x: Array, u: Array) -> Array:
        x0, eps = x - wide(SIG) * u, x + wide(1 - SIG) * u
        if kind == "flow_grpo":
            g = level * np.sqrt(SIG / (1 - SIG))
            drift = u + wide(g**2 / (2 * SIG)) * (x + wide(1 - SIG) * u)
            return joined_array(x + drift * wide(dt), g * np.sqrt(-dt))
        if kind == "dance":
            score = -eps / wide(SIG)
            return joined_array(x + wide(dt) * (u - 0.5 * level**2 * score), level * np.sqrt(-dt))
        std = SIG_NEXT * np.sin(level * np.pi / 2)
        return joined_array(wide(1 - SIG_NEXT) * x0 + wide(np.sqrt(SIG_NEXT**2 - std**2)) * eps, std)

    scales = {"sigma": SIG, "sigma_next": SIG_NEXT}
    return Case(
        lambda x, u: joined(
            diffusion.flow_sde_transition(x, u, **tensors(scales), noise_level=level, kind=kind)
        ),
        truth,
        "xx",
        (0, 1),
    )


def dpo(kind: str, q: float = 0.0) -> Case:
    def truth(w: Array, l_: Array, wr: Array, lr: Array) -> Array:
        z = margin(w, l_, wr, lr) - 0.3
        return {
            "sigmoid": -logsig(z),
            "hinge": np.maximum(0, 1 - z),
            "ipo": (z - 0.5) ** 2,
            "cdpo": -(1 - q) * logsig(z) - q * logsig(-z),
            "linear": np.where(z < -1.25, -z, np.where(z > 1.25, 0, 0.2 * (z - 1.25) ** 2)),
            "robust": (-(1 - q) * logsig(z) + q * logsig(-z)) / (1 - 2 * q),
        }[kind]

    return Case(
        lambda *e: algorithms.diffusion_dpo_loss(*e, beta=40.0, kind=kind, label_smoothing=q, offset=0.3),
        truth,
        "eeee",
        (0, 1),
    )


def tensors(scales: dict[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in scales.items()}


def joined(moments: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([moments[0].flatten(1), moments[1][:, None]], dim=1)


def joined_array(mean: Array, std: Array) -> Array:
    return np.concatenate([mean.reshape(len(mean), -1), std[:, None]], axis=1)


T_A, T_S, T_SIG, T_STD = (torch.from_numpy(values) for values in (A_T, S_T, SIG, STD))
CASES = {
    "prediction_error": Case(diffusion.prediction_error, error, "xx", (0, 1)),
    "add_noise": Case(
        lambda x0, eps: diffusion.add_noise(x0, eps, T_A, T_S),
        lambda x0, eps: wide(A_T) * x0 + wide(S_T) * eps,
        "xx",
        (0, 1),
    ),
    "v_target": Case(
        lambda x0, eps: diffusion.v_target(x0, eps, T_A, T_S),
        lambda x0, eps: wide(A_T) * eps - wide(S_T) * x0,
        "xx",
        (0, 1),
    ),
    "velocity_target": Case(diffusion.velocity_target, lambda x0, eps: eps - x0, "xx", (0, 1)),
    "eps_from_v": Case(
        lambda v, x: diffusion.eps_from_v(v, x, T_A, T_S),
        lambda v, x: wide(A_T) * v + wide(S_T) * x,
        "xx",
        (0, 1),
    ),
    "x0_from_v": Case(
        lambda v, x: diffusion.x0_from_v(v, x, T_A, T_S),
        lambda v, x: wide(A_T) * x - wide(S_T) * v,
        "xx",
        (0, 1),
    ),
    "x0_from_eps": Case(
        lambda eps, x: diffusion.x0_from_eps(eps, x, T_A, T_S),
        lambda eps, x: (x - wide(S_T) * eps) / wide(A_T),
        "xx",
        (0, 1),
    ),
    "eps_from_x0": Case(
        lambda x0, x: diffusion.eps_from_x0(x0, x, T_A, T_S),
        lambda x0, x: (x - wide(A_T) * x0) / wide(S_T),
        "xx",
        (0, 1),
    ),
    "x0_from_velocity": Case(
        lambda u, x: diffusion.x0_from_velocity(u, x, T_SIG), lambda u, x: x - wide(SIG) * u, "xx", (0, 1)
    ),
    "eps_from_velocity": Case(
        lambda u, x: diffusion.eps_from_velocity(u, x, T_SIG),
        lambda u, x: x + (1 - wide(SIG)) * u,
        "xx",
        (0, 1),
    ),
    "ddim eta 0": ddim(0.0),
    "ddim eta 0.5": ddim(0.5),
    "ddim eta 1": ddim(1.0),
    "flow_sde flow_grpo": flow_sde("flow_grpo", 0.7),
    "flow_sde dance": flow_sde("dance", 0.3),
    "flow_sde cps": flow_sde("cps", 0.8),
    "mean_log_prob": Case(
        lambda x, mean: diffusion.mean_log_prob(x, mean, T_STD),
        lambda x, mean: -error(x, mean) / (2 * STD**2) - np.log(STD) - 0.5 * np.log(2 * np.pi),
        "xx",
        (0, 1),
    ),
    "gaussian_kl": Case(
        lambda mean, ref: diffusion.gaussian_kl(mean, ref, T_STD),
        lambda mean, ref: error(mean, ref) / (2 * STD**2),
        "xx",
        (0, 1),
    ),
    "classifier_free_guidance": Case(
        lambda u, c: diffusion.classifier_free_guidance(u, c, scale=7.5),
        lambda u, c: 7.5 * c - 6.5 * u,
        "xx",
        (0, 1),
    ),
    "double_guidance": Case(
        lambda u, i, f: diffusion.double_guidance(u, i, f, image_scale=3.0, text_scale=3.5),
        lambda u, i, f: -2 * u - 0.5 * i + 3.5 * f,
        "xxx",
        (0, 1, 2),
    ),
    "pair_margin": Case(lambda *e: algorithms.pair_margin(*e, beta=40.0), margin, "eeee", (0, 1)),
    "diffusion_dpo_loss sigmoid": dpo("sigmoid"),
    "diffusion_dpo_loss hinge": dpo("hinge"),
    "diffusion_dpo_loss ipo": dpo("ipo"),
    "diffusion_dpo_loss cdpo": dpo("cdpo", 0.2),
    "diffusion_dpo_loss robust": dpo("robust", 0.1),
    "diffusion_dpo_loss linear": dpo("linear"),
    "simpo_loss": Case(
        lambda w, l_: algorithms.simpo_loss(w, l_, beta=40.0, gamma=0.5),
        lambda w, l_: -logsig(20.0 * (l_ - w) - 0.5),
        "ee",
        (0, 1),
    ),
    "exploration_bonus": Case(
        lambda *e: algorithms.exploration_bonus(*e, beta=40.0),
        lambda *e: 1 / (1 + np.exp(margin(*e))),
        "eeee",
        (0, 1),
    ),
    "expo_loss": Case(
        lambda *e: algorithms.expo_loss(*e, beta=40.0, alpha=0.4, beta_explore=30.0)[None],
        lambda *e: np.array(
            [(-logsig(margin(*e[:4]))).mean() + 0.4 * (1 / (1 + np.exp(margin(*e[4:], beta=30.0)))).mean()]
        ),
        "eeeeeeee",
        (0, 1, 4, 5),
    ),
}


def inputs_of(name: str) -> list[Array]:
    generator = numpy_generator("parity", name)
    return [
        generator.normal(size=(3, 2, 2, 2)) if kind == "x" else generator.uniform(0.05, 0.2, size=5)
        for kind in CASES[name].inputs
    ]


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    assert_values_agree(CASES[name], inputs_of(name))


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    assert_gradients_agree(CASES[name], inputs_of(name), name)


def test_every_pure_function_is_derived_here() -> None:
    derived = {name.split(" ")[0] for name in CASES}
    pure = {
        "add_noise", "classifier_free_guidance", "double_guidance", "eps_from_v", "eps_from_velocity",
        "eps_from_x0", "gaussian_kl", "mean_log_prob", "prediction_error", "v_target", "velocity_target",
        "x0_from_eps", "x0_from_v", "x0_from_velocity",
    }  # fmt: skip
    assert pure <= derived & set(diffusion.__all__)
    assert {"ddim_transition", "flow_sde_transition"} <= set(diffusion.__all__)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_any_arithmetic(half: torch.dtype) -> None:
    # Numbers and 0-dim tensors alone would not lift half precision: what is raised must be the latents.
    x, y = (torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(i)).to(half) for i in (0, 1))
    for number in (0.6, torch.tensor(0.6, dtype=torch.float64), torch.full((3,), 0.6)):
        for function in (
            diffusion.add_noise,
            diffusion.v_target,
            diffusion.x0_from_eps,
            diffusion.eps_from_v,
        ):
            expected = function(x.float(), y.float(), number, 0.8)
            assert torch.equal(function(x, y, number, 0.8), expected) and expected.dtype == torch.float32
    assert torch.equal(diffusion.velocity_target(x, y), y.float() - x.float())
    assert torch.equal(diffusion.prediction_error(x, y), diffusion.prediction_error(x.float(), y.float()))
    errors = [torch.rand(5).to(half) for _ in range(4)]
    raised = [e.float() for e in errors]
    assert torch.equal(
        algorithms.diffusion_dpo_loss(*errors, beta=5000.0),
        algorithms.diffusion_dpo_loss(*raised, beta=5000.0),
    )


def test_numbers_and_rows_of_coefficients_agree() -> None:
    x0, eps = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    scales = {"alpha_t": 0.6, "sigma_t": 0.8, "alpha_s": 0.8, "sigma_s": 0.6, "eta": 0.7}
    rows = {name: torch.full((3,), value, dtype=torch.float64) for name, value in scales.items()}
    for one, other in zip(
        diffusion.ddim_transition(x0, eps, **scales), diffusion.ddim_transition(x0, eps, **rows), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=1e-15)
    step = {"sigma": 0.8, "sigma_next": 0.5, "noise_level": 0.4}
    rows = {name: torch.full((3,), value, dtype=torch.float64) for name, value in step.items()}
    for kind in ("flow_grpo", "dance", "cps"):
        ours = diffusion.flow_sde_transition(x0, eps, **step, kind=kind)
        for one, other in zip(ours, diffusion.flow_sde_transition(x0, eps, **rows, kind=kind), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-15, atol=1e-15)
    for std in (0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)):
        expected = -((x0 - eps) ** 2).flatten(1).mean(1) / 0.18 - np.log(0.3 * np.sqrt(2 * np.pi))
        torch.testing.assert_close(diffusion.mean_log_prob(x0, eps, std), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            diffusion.gaussian_kl(x0, eps, std), ((x0 - eps) ** 2).flatten(1).mean(1) / 0.18
        )
