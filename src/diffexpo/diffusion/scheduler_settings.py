"""What a diffusers `scheduler_config.json` may say: classes whose noise levels are known, and values of the
right kind. A class that is not known is refused, whatever its settings are called: read as another one it
would train on wrong noise levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from diffexpo.errors import PolicyError

BETA_TABLES = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "LCM", "TCD", "SASolver"),
        *("DEISMultistep", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep"),
        *("DPMSolverSDE", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"),
        *("KDPM2AncestralDiscrete", "LMSDiscrete", "UniPCMultistep"),
    )
)
"""Schedulers whose noise levels are a table of betas."""
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
# Flow schedules other than the plain shifted one.
FLOW_SPACINGS = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
MOST_LEVELS = 10_000
_TEXTS = ("prediction_type", "beta_schedule", "timestep_spacing", "variance_type", "time_shift_type")
_TRUTHS = (
    *("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr", "use_dynamic_shifting"),
    *("use_flow_sigmas", *FLOW_SPACINGS[1:]),
)
_SHARES = ("beta_start", "beta_end")
_NUMBERS = ("clip_sample_range", "shift", "flow_shift", "base_shift", "max_shift")
_COUNTS = ("num_train_timesteps", "steps_offset", "base_image_seq_len", "max_image_seq_len")


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raise a PolicyError for a class that is not known, and for a value that is not of its kind."""
    name = config.get("_class_name")
    if name not in (*BETA_TABLES, *FLOWS):
        raise PolicyError(
            f"scheduler {name!r:.80} is not known, nor what its noise levels are; expected one of "
            f"{', '.join((*BETA_TABLES, *FLOWS))}"
        )
    if config.get("timestep_type") == "continuous":
        raise PolicyError(
            f"scheduler {name} with timestep_type continuous: its noise levels are sigmas of their own, not "
            "a table of betas, and are not reproduced here; expected timestep_type discrete"
        )
    for key, value in config.items():
        if expected := _expected(key, value):
            raise PolicyError(f"scheduler {key} is {value!r:.80}; expected {expected}")


def _expected(key: str, value: object) -> str:
    """What a setting has to be; "" if it is that."""
    if key in _TEXTS:
        return "" if value is None or isinstance(value, str) else "text"
    if key in _TRUTHS:
        return "" if value is None or isinstance(value, bool) else "true or false"
    if key in _SHARES:
        return "" if _is_number(value) and 0 <= value <= 1 else "a number from 0 to 1"
    if key in _NUMBERS:
        return "" if _is_number(value) else "a number"
    if key in _COUNTS:
        least = 0 if key == "steps_offset" else 1
        is_good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_LEVELS
        return "" if is_good else f"an integer from {least} to {MOST_LEVELS}"
    if key == "trained_betas" and value is not None:
        is_row = isinstance(value, list) and len(value) <= MOST_LEVELS and all(map(_is_number, value))
        return "" if is_row else f"null or a list of up to {MOST_LEVELS} numbers"
    return ""


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
