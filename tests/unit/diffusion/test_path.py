"""The noising path: times, what the network is fed, training times, and settings that are refused."""

from __future__ import annotations

import pytest
import torch

from diffexpo.diffusion import NoiseDraw, Path, empty_prompt_mask, prediction_error
from diffexpo.diffusion.path import shifted
from diffexpo.errors import PolicyError
from tests.unit.diffusion.toys import ABAR

DDIM = {"_class_name": "DDIMScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def test_every_level_survives_float32() -> None:
    path = Path.vp(ABAR)
    index = torch.arange(1000)
    t = index.to(torch.float32) / 999
    assert torch.equal(path.timestep(t), index)
    alpha, sigma = path.alpha_sigma(t.double())
    assert torch.equal(alpha, ABAR.sqrt()) and torch.equal(sigma, (1 - ABAR).sqrt())
    assert path.timestep(torch.tensor([0.0, 1.0])).tolist() == [0, 999]
    assert path.alpha_sigma(t)[0].dtype == torch.float32


def test_flow_times() -> None:
    path, t = Path.flow(3.0), torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    alpha, sigma = path.alpha_sigma(t)
    assert alpha.tolist() == [1.0, 0.75, 0.0] and sigma.tolist() == [0.0, 0.25, 1.0]
    assert path.timestep(t).tolist() == [0.0, 250.0, 1000.0]


def test_shift_keeps_both_ends() -> None:
    assert shifted(0.0, 3.0) == 0.0 and shifted(1.0, 3.0) == 1.0 and shifted(0.4, 1.0) == 0.4
    assert shifted(0.5, 3.0) == pytest.approx(0.75)


def test_training_times() -> None:
    draw = Path.vp(ABAR).training_t(40_000, torch.Generator().manual_seed(0))
    level = torch.round(draw * 999).long()
    counts = torch.bincount(level, minlength=1000).double()
    assert len(counts) == 1000 and counts.min() > 0
    # Chi-square with 999 degrees of freedom: mean 999, standard deviation 45.
    assert abs(float(((counts - 40) ** 2 / 40).sum()) - 999) < 5 * 45
    for shift, middle in ((1.0, 0.5), (3.0, 0.75)):
        t = Path.flow(shift).training_t(40_000, torch.Generator().manual_seed(0)).double()
        assert float(t.median()) == pytest.approx(middle, abs=0.01)
        assert t.min() > 0 and t.max() < 1
    logit = torch.logit(Path.flow().training_t(40_000, torch.Generator().manual_seed(0)).double())
    assert float(logit.mean()) == pytest.approx(0, abs=0.03)
    assert float(logit.std()) == pytest.approx(1, abs=0.03)


def test_noise_draw_rows_are_standard_normal_and_never_shared() -> None:
    draw = NoiseDraw.keyed([str(row) for row in range(200)], (0, "noise"), Path.vp(ABAR), (4, 8, 8))
    assert float(draw.eps.mean()) == pytest.approx(0, abs=0.02)
    assert float(draw.eps.std()) == pytest.approx(1, abs=0.02)
    assert draw.eps.dtype == draw.t.dtype == torch.float32
    flat = draw.eps.flatten(1)
    correlation = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 6 / 16  # 256 elements: standard error 1 / 16


def test_empty_prompts_are_keyed_and_at_the_asked_rate() -> None:
    keys = [str(row) for row in range(4000)]
    mask = empty_prompt_mask(keys, (0, 1, "noise"), 0.2)
    assert float(mask.double().mean()) == pytest.approx(0.2, abs=0.02)
    assert torch.equal(empty_prompt_mask(keys[10:20], (0, 1, "noise"), 0.2), mask[10:20])
    assert not torch.equal(empty_prompt_mask(keys, (0, 2, "noise"), 0.2), mask)
    assert not empty_prompt_mask(keys, (0,), 0.0).any() and empty_prompt_mask(keys, (0,), 1.0).all()
    # A larger fraction only adds rows.
    assert (empty_prompt_mask(keys, (0, 1, "noise"), 0.4) | ~mask).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DDIM | {"thresholding": True}, "thresholding is true"),
        (DDIM | {"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; expected linear"),
        (DDIM | {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        (DDIM | {"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        (DDIM | {"rescale_betas_zero_snr": True}, "ends at 0.*expected v_prediction"),
        (DDIM | {"trained_betas": [0.5, -0.5, 0.1]}, "decreases within"),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned_range"},
            "variance_type is 'learned_range'",
        ),
        (DDIM | {"num_train_timesteps": 10**10}, "num_train_timesteps is 1.*an integer from 1 to 10000"),
        (DDIM | {"num_train_timesteps": 0}, "num_train_timesteps is 0; expected an integer from 1"),
        (DDIM | {"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'; expected an integer"),
        (DDIM | {"beta_start": None}, "beta_start is None; expected a number from 0 to 1"),
        (DDIM | {"beta_start": -1, "beta_schedule": "scaled_linear"}, "beta_start is -1; expected a number"),
        (DDIM | {"beta_end": float("nan")}, "beta_end is nan; expected a number"),
        (DDIM | {"trained_betas": [[0.1]]}, "trained_betas is .*; expected null or a list"),
        (DDIM | {"steps_offset": -1}, "steps_offset is -1; expected an integer from 0"),
        (DDIM | {"set_alpha_to_one": "no"}, "set_alpha_to_one is 'no'; expected true or false"),
        (DDIM | {"timestep_spacing": []}, r"timestep_spacing is \[\]; expected text"),
        (FLOW | {"shift": "3"}, "shift is '3'; expected a number"),
        (DDIM | {"use_flow_sigmas": True}, "use_flow_sigmas is true: its levels are those of a flow"),
        (FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting is true"),
        (FLOW | {"shift": 0.0}, "shift is 0.0; expected a number above 0"),
        (FLOW | {"shift_terminal": 0.02}, "shift_terminal is 0.02"),
        (FLOW | {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
    ],
)
def test_what_is_not_reproduced_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Path.from_scheduler_config(config)


def test_tables_are_checked() -> None:
    for table, message in (
        (torch.tensor([0.9]), "two or more levels"),
        (torch.tensor([0.5, 0.9]), "decreases within"),
        (torch.tensor([0.9, float("nan")]), "decreases within"),
        (torch.tensor([1.5, 0.5]), "decreases within"),
    ):
        with pytest.raises(PolicyError, match=message):
            Path.vp(table)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and target \(2, 1\)"):
        prediction_error(torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"_class_name": None},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "FlowMapEulerDiscreteScheduler"},
        {"_class_name": "MyDDIMScheduler"},
        {"_class_name": "EDMDPMSolverMultistepScheduler"},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
    ],
)
def test_schedulers_whose_levels_are_no_table_of_betas_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match="is not known, nor what its noise levels|sigmas of their own"):
        Path.from_scheduler_config(config)
