"""Mathematics of diffusion and flow matching: paths, kernels, guidance, sampling, objectives (torch only)."""

from diffexpo.diffusion.guidance import classifier_free_guidance, double_guidance
from diffexpo.diffusion.kernels import (
    add_noise,
    ddim_transition,
    eps_from_v,
    eps_from_velocity,
    eps_from_x0,
    flow_sde_transition,
    gaussian_kl,
    mean_log_prob,
    prediction_error,
    v_target,
    velocity_target,
    x0_from_eps,
    x0_from_v,
    x0_from_velocity,
)
from diffexpo.diffusion.objectives import NoiseDraw, empty_prompt_mask, pair_errors, prediction_errors
from diffexpo.diffusion.path import Path
from diffexpo.diffusion.sampling import (
    NoiseSource,
    num_network_evaluations,
    predict_guided,
    replay_transitions,
    sample,
    sample_trajectory,
)
from diffexpo.diffusion.signal import MarginSignal, margin_signal
from diffexpo.diffusion.transitions import Transition, sampler_grid, step_moments

__all__ = [
    "MarginSignal",
    "NoiseDraw",
    "NoiseSource",
    "Path",
    "Transition",
    "add_noise",
    "classifier_free_guidance",
    "ddim_transition",
    "double_guidance",
    "empty_prompt_mask",
    "eps_from_v",
    "eps_from_velocity",
    "eps_from_x0",
    "flow_sde_transition",
    "gaussian_kl",
    "margin_signal",
    "mean_log_prob",
    "num_network_evaluations",
    "pair_errors",
    "predict_guided",
    "prediction_error",
    "prediction_errors",
    "replay_transitions",
    "sample",
    "sample_trajectory",
    "sampler_grid",
    "step_moments",
    "v_target",
    "velocity_target",
    "x0_from_eps",
    "x0_from_v",
    "x0_from_velocity",
]
