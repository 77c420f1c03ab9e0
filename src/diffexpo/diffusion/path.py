"""The noising path x_t = alpha_t x0 + sigma_t eps of a model, and what its network predicts.

t is a float in [0, 1], 1 is pure noise. Integer timesteps and 0..1000 exist only in `timestep`, which gives
what the network is fed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from diffexpo.diffusion.kernels import (
    Coefficient,
    at_least_float32,
    eps_from_v,
    eps_from_velocity,
    eps_from_x0,
    v_target,
    velocity_target,
    x0_from_eps,
    x0_from_v,
    x0_from_velocity,
)
from diffexpo.diffusion.scheduler_settings import FLOW_SPACINGS, FLOWS, check_scheduler
from diffexpo.errors import PolicyError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
Spacing = Literal["leading", "trailing", "linspace"]
LowestLevel = Literal["shifted", "plain", "steps"]

# Defaults of diffusers' scheduler classes, by how their names begin, for settings that a file leaves out.
LINSPACE_BY_DEFAULT = ("DEIS", "DPMSolver", "Euler", "Heun", "KDPM2", "LMS", "SASolver", "UniPC")
SMALL_BETAS_BY_DEFAULT = ("Heun", "KDPM2", "LCM", "TCD")
SCALED_LINEAR_BY_DEFAULT = ("LCM", "TCD")


@dataclass(frozen=True, eq=False)
class Path:
    """Schedule and prediction type of one model.

    kind "vp": a table abar of N levels, alpha_t = sqrt(abar), sigma_t = sqrt(1 - abar), t = index / (N - 1).
    kind "flow": alpha_t = 1 - t, sigma_t = t, network timestep 1000 t; `shift` moves the levels that are used
    towards noise. `lowest_level` is where the sampler's even list of levels ends before it is shifted: at the
    lowest level of the training list, which is shifted already ("shifted": 1 / N goes through the shift
    twice), at 1 / num_train_timesteps ("plain", dynamic shifting), or at 1 / steps ("steps", FLUX).

    The remaining fields say how the model's own scheduler walks the path when it samples.
    """

    kind: Literal["vp", "flow"]
    prediction_type: PredictionType
    num_train_timesteps: int = 1000
    alphas_cumprod: Tensor | None = None
    shift: float = 1.0
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample_range: float | None = None
    lowest_level: LowestLevel = "shifted"

    @staticmethod
    def vp(
        alphas_cumprod: Tensor,
        prediction_type: PredictionType = "epsilon",
        *,
        timestep_spacing: Spacing = "leading",
        steps_offset: int = 0,
        set_alpha_to_one: bool = True,
        clip_sample_range: float | None = None,
    ) -> Path:
        """Variance-preserving path from the table abar (N,), decreasing within [0, 1], kept in float64.

        Raises:
            PolicyError: the table does not decrease within [0, 1], ends at 0 for a network that predicts eps
                (x0 would be divided by 0), or an unknown prediction type or spacing.
        """
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise PolicyError(
                f"alphas_cumprod has shape {tuple(table.shape)}; expected one row of two or more levels"
            )
        if not bool(((table >= 0) & (table <= 1)).all()) or bool((table.diff() > 0).any()):
            raise PolicyError(
                f"alphas_cumprod runs from {float(table[0]):g} to {float(table[-1]):g}; expected a table "
                "that decreases within [0, 1]"
            )
        if prediction_type == "epsilon" and float(table[-1]) == 0:
            raise PolicyError(
                "alphas_cumprod ends at 0 (zero signal) and prediction_type is 'epsilon': x0 cannot be had "
                "from eps there; expected v_prediction or sample, or rescale_betas_zero_snr false"
            )
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise PolicyError(
                f"prediction_type is {prediction_type!r}; a variance-preserving model predicts epsilon, "
                "v_prediction or sample"
            )
        if timestep_spacing not in ("leading", "trailing", "linspace"):
            raise PolicyError(
                f"timestep_spacing is {timestep_spacing!r}; expected leading, trailing or linspace"
            )
        return Path(
            "vp",
            prediction_type,
            len(table),
            table,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            set_alpha_to_one=set_alpha_to_one,
            clip_sample_range=clip_sample_range,
        )

    @staticmethod
    def flow(
        shift: float = 1.0, *, num_train_timesteps: int = 1000, lowest_level: LowestLevel = "shifted"
    ) -> Path:
        """Rectified-flow path whose network predicts the velocity eps - x0."""
        if not shift > 0:
            raise PolicyError(f"shift is {shift}; expected a number above 0 (1 is no shift, SD3 has 3)")
        return Path("flow", "flow", num_train_timesteps, shift=float(shift), lowest_level=lowest_level)

    @staticmethod
    def from_scheduler_config(
        config: Mapping[str, Any],
        *,
        image_tokens: int | None = None,
        lowest_level: LowestLevel | None = None,
    ) -> Path:
        """Path of a diffusers `scheduler_config.json`, read as a plain mapping.

        Args:
            config: The scheduler's settings, with `_class_name`. Missing keys take that class's own defaults.
            image_tokens: Tokens that the transformer makes of an image; dynamic shifting follows from them.
            lowest_level: For a pipeline that gives its flow scheduler a list of levels ("steps": FLUX); None
                is the scheduler's own list.
        Returns:
            The path; SD 1.5's file gives abar[0] = 0.99915 and abar[999] = 0.00466.
        Raises:
            PolicyError: an unknown class, a value that is not of its kind, or a setting that this package
                does not reproduce (thresholding, dynamic shifting of an unknown number of tokens, another
                spacing of flow levels, a learned variance, unknown schedule).
        Source: diffusers' DDIM, DDPM and flow-match Euler schedulers; the table is computed in float64 here,
            float32 there.
        """
        name = str(config.get("_class_name", ""))
        check_scheduler(config)
        if name in FLOWS:
            for key in FLOW_SPACINGS:
                if config.get(key):
                    raise PolicyError(
                        f"scheduler {key} is {config[key]!r}; it spaces or steps the flow in another way and "
                        "is not reproduced here: remove it"
                    )
            is_dynamic = bool(config.get("use_dynamic_shifting"))
            return Path.flow(
                _dynamic_shift(config, image_tokens) if is_dynamic else float(config.get("shift", 1.0)),
                num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
                lowest_level=lowest_level or ("plain" if is_dynamic else "shifted"),
            )
        if config.get("use_flow_sigmas"):
            raise PolicyError(
                "scheduler use_flow_sigmas is true: its levels are those of a flow, for which "
                "this model has no table of betas; set it to false, or take the flow-match scheduler"
            )
        if config.get("thresholding"):
            raise PolicyError(
                "scheduler thresholding is true; it is for pixel models and not reproduced here: set it to "
                "false"
            )
        if config.get("variance_type") not in (None, "fixed_small", "fixed_small_log"):
            raise PolicyError(
                f"scheduler variance_type is {config['variance_type']!r}; expected fixed_small, whose ddpm "
                "step is the one reproduced here"
            )
        clip = bool(config.get("clip_sample", name.startswith(("DDIM", "DDPM"))))
        spaced_by_default = "linspace" if name.startswith(LINSPACE_BY_DEFAULT) else "leading"
        return Path.vp(
            _alphas_cumprod(config),
            config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get("timestep_spacing", spaced_by_default),
            steps_offset=int(config.get("steps_offset", 0)),
            set_alpha_to_one=bool(config.get("set_alpha_to_one", not name.startswith("PNDM"))),
            clip_sample_range=float(config.get("clip_sample_range", 1.0)) if clip else None,
        )

    @property
    def table(self) -> Tensor:
        """abar by level, of a path that has such a table (every one but the flow's)."""
        assert self.alphas_cumprod is not None
        return self.alphas_cumprod

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) at t, in t's precision; t = 1 is the noisiest level, index N - 1 of a table."""
        if self.kind == "flow":
            return 1 - t, t
        abar = self.table[self._index(t).cpu()]
        dtype = t.dtype if t.dtype in (torch.float32, torch.float64) else torch.float32
        return abar.sqrt().to(t.device, dtype), (1 - abar).sqrt().to(t.device, dtype)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is fed: the integer index (vp) or num_train_timesteps * t (flow)."""
        return t * self.num_train_timesteps if self.kind == "flow" else self._index(t)

    def x0_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network's prediction at x_t, t (B,) implies."""
        return self.x0_eps_at(prediction, x_t, *self.alpha_sigma(t))

    def x0_eps_at(
        self, prediction: Tensor, x_t: Tensor, alpha_t: Coefficient, sigma_t: Coefficient
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network's prediction implies, with the scales given."""
        if self.prediction_type == "epsilon":
            return x0_from_eps(prediction, x_t, alpha_t, sigma_t), at_least_float32(prediction)
        if self.prediction_type == "v_prediction":
            return x0_from_v(prediction, x_t, alpha_t, sigma_t), eps_from_v(prediction, x_t, alpha_t, sigma_t)
        if self.prediction_type == "sample":
            return at_least_float32(prediction), eps_from_x0(prediction, x_t, alpha_t, sigma_t)
        return x0_from_velocity(prediction, x_t, sigma_t), eps_from_velocity(prediction, x_t, sigma_t)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for x0, eps at t (B,)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "v_prediction":
            return v_target(x0, eps, *self.alpha_sigma(t))
        if self.prediction_type == "sample":
            return x0
        return velocity_target(x0, eps)

    def training_t(self, count: int, generator: torch.Generator, part: tuple[int, int] = (0, 1)) -> Tensor:
        """Training times t (count,) float32.

        vp: uniform over the N levels; flow: logit-normal(0, 1), then shifted. With `part` = (k, K) they come
        from the k-th of K slices, from low to high times, that are equally probable (of a vp table: up to one
        level).

        Source: Diffusion-DPO's code (uniform); SD3 (arXiv 2403.03206) section 3.1 and eq. 23 (logit-normal,
            shift).
        """
        k, parts = part
        if self.kind == "vp":
            first, stop = (number * self.num_train_timesteps // parts for number in (k, k + 1))
            index = torch.randint(first, max(stop, first + 1), (count,), generator=generator)
            return index.to(torch.float32) / (self.num_train_timesteps - 1)
        if parts == 1:
            normal = torch.randn(count, generator=generator)
        else:
            share = (k + torch.rand(count, generator=generator, dtype=torch.float64)) / parts
            normal = torch.special.ndtri(share).to(torch.float32)
        return shifted(torch.sigmoid(normal), self.shift)

    def _index(self, t: Tensor) -> Tensor:
        return torch.round(t.to(torch.float32) * (self.num_train_timesteps - 1)).to(torch.int64)


@overload
def shifted(sigma: float, shift: float) -> float: ...
@overload
def shifted(sigma: Tensor, shift: float) -> Tensor: ...
def shifted(sigma: Coefficient, shift: float) -> Coefficient:
    """Noise level after the resolution shift, shift sigma / (1 + (shift - 1) sigma); 0 and 1 stay.

    Source: SD3 (arXiv 2403.03206) eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(
    image_tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    kind: Literal["exponential", "linear"] = "exponential",
) -> float:
    """The shift for an image of a given number of tokens: exp(mu), with mu linear in that number.

    mu = base_shift + (max_shift - base_shift) (image_tokens - base_tokens) / (max_tokens - base_tokens)

    Args:
        image_tokens: Tokens of the image, >= 1; 1024 x 1024 pixels are 4096 in FLUX.
        base_shift, max_shift: mu at base_tokens and at max_tokens.
        base_tokens, max_tokens: Two different numbers of tokens.
        kind: "exponential": exp(mu); "linear": mu itself.
    Returns:
        The shift for `shifted`; exp(0.5) = 1.6487 at 256 tokens, exp(1.15) = 3.1582 at 4096.
    Source: FLUX.1's sampling code and diffusers' `calculate_shift`; exp(mu) / (exp(mu) + 1 / sigma - 1) there
        is eq. 23 of SD3 (arXiv 2403.03206) with shift exp(mu).
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = image_tokens * slope + (base_shift - slope * base_tokens)
    return math.exp(mu) if kind == "exponential" else mu


def _dynamic_shift(config: Mapping[str, Any], image_tokens: int | None) -> float:
    """The shift of a scheduler with `use_dynamic_shifting`."""
    if image_tokens is None:
        raise PolicyError(
            "scheduler use_dynamic_shifting is true, and the number of image tokens that its shift follows "
            "from is not known here; set it to false and give `shift`"
        )
    return dynamic_shift(
        image_tokens,
        base_shift=float(config.get("base_shift", 0.5)),
        max_shift=float(config.get("max_shift", 1.15)),
        base_tokens=int(config.get("base_image_seq_len", 256)),
        max_tokens=int(config.get("max_image_seq_len", 4096)),
        kind=config.get("time_shift_type", "exponential"),
    )


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The table abar in float64 from a scheduler's beta settings."""
    count = int(config.get("num_train_timesteps", 1000))
    name = str(config.get("_class_name", ""))
    scaled = name.startswith(SCALED_LINEAR_BY_DEFAULT)
    schedule = str(config.get("beta_schedule", "scaled_linear" if scaled else "linear"))
    lowest, highest = (8.5e-4, 0.012) if name.startswith(SMALL_BETAS_BY_DEFAULT) else (1e-4, 0.02)
    start, end = float(config.get("beta_start", lowest)), float(config.get("beta_end", highest))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        share = torch.arange(count + 1, dtype=torch.float64) / count
        level = torch.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    else:
        raise PolicyError(
            f"scheduler beta_schedule is {schedule!r}; expected linear, scaled_linear or squaredcos_cap_v2"
        )
    abar = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar
