"""A model as its own judge: scores from denoising errors of the drawn latents, without a reward model.

implicit    beta/2 mean over K draws of ( e_base(x_t, c) - e_trained(x_t, c) )
            what a model trained on pairs came to prefer
denoising   mean over K draws of ( e(x_t, empty) - e(x_t, c) )
            how much the prompt helps to denoise the image

Both look at latents as they were drawn, so nothing goes through the autoencoder. Noise and t of the K draws
are keyed by the prompt alone: all candidates of a prompt meet the same ones, and only what differs between
the images is left in a comparison. An image is scored in network calls of its own, whose shape does not
depend on what else is scored, so a score has the same bits in any batch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from diffexpo.config.rewards import SelfJudgeConfig
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.diffusion.objectives import NoiseDraw, prediction_errors
from diffexpo.errors import ConfigError, RewardError
from diffexpo.types import Policy

# Embedded prompts that are kept: candidates of one prompt are consecutive.
KEPT_PROMPTS = 64


def implicit_scores(errors: Tensor, base_errors: Tensor, *, beta: float) -> Tensor:
    """Implicit reward of images under a model trained on pairs, beta/2 mean_k (base_errors - errors).

    Args:
        errors: (B,K) mean squared prediction errors of the trained model at K draws of noise and time.
        base_errors: (B,K) those of the model that training started from, at the same draws.
        beta: > 0; the unit of the score alone, it changes no order.
    Returns:
        (B,), higher where training has lowered the error more. Equal errors give exactly 0.
    Raises:
        ValueError: the shapes differ, or beta is not above 0.
    Source: Diffusion-DPO (arXiv 2311.12908) eq. 14: its logit is the difference of two of these. The paper
        takes one draw, a judge needs the mean over several.
    """
    _check_errors("implicit_scores", errors, base_errors)
    if not beta > 0:
        raise ValueError(f"implicit_scores: beta is {beta}; expected a number above 0")
    return 0.5 * beta * (at_least_float32(base_errors) - at_least_float32(errors)).mean(dim=1)


def denoising_scores(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """How much its prompt helps to denoise each image, -mean_k (conditional - unconditional).

    Args:
        conditional: (B,K) mean squared prediction errors given the prompt, at K draws of noise and time.
        unconditional: (B,K) those given the empty prompt, at the same draws.
    Returns:
        (B,), higher where the prompt explains more of the image. A model that ignores its prompt gives
        exactly 0.
    Raises:
        ValueError: the shapes differ.
    Source: the errors are those of the diffusion classifier (arXiv 2303.16203) eq. 7, which compares prompts
        of one image; we compare images of one prompt, hence the difference to the empty prompt: without it
        the plainest image would win.
    """
    _check_errors("denoising_scores", conditional, unconditional)
    return -(at_least_float32(conditional) - at_least_float32(unconditional)).mean(dim=1)


class SelfJudge(ABC):
    """What both judges share: draws keyed by the prompt, and errors of one image at all of them."""

    reads = "latents"

    def __init__(self, name: str, policy: Policy, settings: SelfJudgeConfig) -> None:
        """`policy`: the judge's own; a run that trains or draws besides must not switch its weights."""
        self.name, self.policy, self.settings = name, policy, settings
        low, high = settings.timestep_range
        self._range = f"t in [{low:g}, {high:g}]"
        self._row = lru_cache(KEPT_PROMPTS)(lambda text: policy.encode_prompts([text]).to(policy.device))

    @property
    def version(self) -> str:
        """sha256 of the weights and of the settings that act."""
        text = "|".join([type(self).__name__, *self._parts(), str(self.settings.draws), self._range])
        return hashlib.sha256(text.encode()).hexdigest()

    def score(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 for latents (B,C,h,w) and their prompts, the same bits however a batch is cut;
        RewardError for latents of another shape, or if there is not one prompt for each."""
        shape = tuple(self.policy.latent_shape)
        if len(latents) != len(prompts) or tuple(latents.shape[1:]) != shape:
            raise RewardError(
                f"reward {self.name!r}: latents of shape {tuple(latents.shape)} for {len(prompts)} prompts; "
                f"expected ({len(prompts)}, {', '.join(map(str, shape))}), the latents of the judge's own "
                "model"
            )
        scores = torch.empty(len(prompts), dtype=torch.float32)
        with torch.no_grad():
            for row, prompt in enumerate(prompts):
                scores[row] = self._score(latents[row : row + 1], prompt)[0].cpu()
        return scores

    @abstractmethod
    def _score(self, latents: Tensor, prompt: str) -> Tensor:
        """(1,) for one image's latents (1,C,h,w)."""

    def _parts(self) -> list[str]:
        """What, besides draws and range, decides a score: the weights' fingerprints among it."""
        return [self.policy.fingerprint]

    def _draw(self, prompt: str) -> NoiseDraw:
        names = [str(number) for number in range(self.settings.draws)]
        key, shape = ("self-judge", prompt), tuple(self.policy.latent_shape)
        return NoiseDraw.keyed(names, key, self.policy.path, shape, self.settings.timestep_range)

    def _errors(self, version: str, latents: Tensor, draw: NoiseDraw, text: str) -> Tensor:
        """Errors (1,K) of one image (1,C,h,w) at all draws, in one call."""
        count = len(draw.t)
        x0 = latents.to(self.policy.device).expand(count, -1, -1, -1)
        conditioning = self._row(text).select([0] * count)
        with self.policy.weights.use(version):
            return prediction_errors(self.policy, x0, draw.eps, draw.t, conditioning)[None]


class ImplicitReward(SelfJudge):
    """The implicit reward of a model trained on pairs (by DPO, say) against the model it started from.

    The trained model is a given, finished one, not the run's current weights. Those would judge by what they
    are being trained to prefer: pairs that they rank carry the sign of their own margin, so the loss would
    only reinforce the model's current preferences; scores of two iterations would not compare; and before the
    first update all are 0.
    """

    def __init__(self, name: str, policy: Policy, settings: SelfJudgeConfig) -> None:
        """`policy`: its version "current" is the trained model, "base" what it started from; a ConfigError
        refuses two that are equal, as every score would be 0."""
        super().__init__(name, policy, settings)
        if _is_base(policy):
            reason = "the trained weights are those of its base, so every image would score 0"
            advice = "expected a model that was trained on pairs, e.g. path: runs/dpo_offline"
            raise ConfigError(f"reward {name!r} (type implicit): {reason}; {advice}")
        self.scale = (
            f"beta/2 x (error of the base - error of the trained model), beta {settings.beta:g}, "
            f"{settings.draws} draws, {self._range}"
        )

    def _score(self, latents: Tensor, prompt: str) -> Tensor:
        draw = self._draw(prompt)
        trained, base = (self._errors(version, latents, draw, prompt) for version in ("current", "base"))
        return implicit_scores(trained, base, beta=self.settings.beta)

    def _parts(self) -> list[str]:
        return [*super()._parts(), self.policy.weights.fingerprint("current"), str(self.settings.beta)]


class DenoisingReward(SelfJudge):
    """How much better the base model denoises an image when it is told the prompt."""

    def __init__(self, name: str, policy: Policy, settings: SelfJudgeConfig) -> None:
        """`policy`: its version "base" judges."""
        super().__init__(name, policy, settings)
        self.scale = f"error without prompt - error with prompt, {settings.draws} draws, {self._range}"

    def _score(self, latents: Tensor, prompt: str) -> Tensor:
        draw = self._draw(prompt)
        conditional, unconditional = (self._errors("base", latents, draw, text) for text in (prompt, ""))
        return denoising_scores(conditional, unconditional)


def _is_base(policy: Policy) -> bool:
    """Whether "current" draws what "base" does: the same values, or an adapter whose update is 0."""
    updates = [value for name, value in policy.weights.state("current").items() if ".lora_B." in name]
    if updates:
        return not any(bool(value.any()) for value in updates)
    return policy.weights.fingerprint("current") == policy.weights.fingerprint("base")


def _check_errors(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 2:
        advice = "expected two of one shape (B, K)"
        raise ValueError(f"{name}: errors of shape {tuple(first.shape)} and {tuple(second.shape)}; {advice}")
