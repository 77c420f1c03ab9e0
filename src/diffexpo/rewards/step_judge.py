"""A step-aware judge: how well what a noisy latent x_t will become fits a prompt (SPO's preference model, on
latents).

    score = scale(level) cos( text(prompt), f(x_t / r, level) ),
    r = sqrt(alpha_t^2 + sigma_t^2),   level = 2/pi atan2(sigma_t, alpha_t)

The caption side is the text tower of a CLIP judge, as it is; f is a small network on latents. Divided by r, a
state of a flow model is the state of a diffusion model at the same signal-to-noise ratio, so one network
serves both paths. Source: SPO (arXiv 2406.04314) section 4, whose preference model is a CLIP on the decoded
x0 prediction, its norms conditioned on the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, normalize

from diffexpo.bounded.texts import read_json
from diffexpo.errors import ConfigError, MissingError, RewardError
from diffexpo.phases import phase
from diffexpo.rewards.clip import ClipReward
from diffexpo.rewards.weights import Device

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "step_judge"
LEVEL_FEATURES = 16
LEVEL_WIDTH = 32
POOLED_TOKENS = 4
TEXT_SAMPLE, TEXT_TOLERANCE = "red apple", 1e-3
LOWEST_LOG_SCALE, HIGHEST_LOG_SCALE = 0.0, math.log(100.0)


@dataclass(frozen=True)
class StepJudgeShape:
    """What a step judge's config.json holds besides its kind.

    `text` names the CLIP judge of the caption side (a folder, relative to the judge's own if it lies there; a
    hub id; an `emoji:` alias); `text_sample` are the first numbers of its embedding of TEXT_SAMPLE, to know
    it again. `paths` are the kinds of model whose states it was trained on. `latent_shape` is (C, h, w), in
    patches of `patch` latent pixels, each a token of `width` numbers.
    """

    latent_shape: tuple[int, ...]
    paths: tuple[str, ...]
    text: str
    text_sample: tuple[float, ...]
    embedding: int
    patch: int
    width: int
    hidden: int
    blocks: int


class StepJudgeNetwork(nn.Module):
    """f and scale: a mixer on latent patches whose norms are shifted and scaled by the noise level."""

    def __init__(self, shape: StepJudgeShape) -> None:
        super().__init__()
        channels, height, width = shape.latent_shape
        tokens = (height // shape.patch) * (width // shape.patch)
        kernel = 3 if shape.patch == 1 else shape.patch
        self.stem = nn.Conv2d(
            channels, shape.width, kernel, stride=shape.patch, padding=int(shape.patch == 1)
        )
        self.place = nn.Parameter(0.02 * torch.randn(tokens, shape.width))
        self.level = nn.Linear(LEVEL_FEATURES, LEVEL_WIDTH)
        self.blocks = nn.ModuleList(_Block(tokens, shape.width, shape.hidden) for _ in range(shape.blocks))
        self.pool = nn.Linear(tokens, POOLED_TOKENS)
        self.read = nn.Linear(POOLED_TOKENS * shape.width, shape.embedding)
        self.log_scale = nn.Linear(LEVEL_FEATURES, 1)
        nn.init.zeros_(self.log_scale.weight)
        nn.init.constant_(self.log_scale.bias, math.log(1 / 0.07))

    def forward(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) and scales (B,) of unit-variance states x (B,C,h,w) at levels (B,)."""
        features = level_features(level)
        condition = gelu(self.level(features))
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            tokens = block(tokens, condition)
        pooled = self.pool(layer_norm(tokens, tokens.shape[-1:]).transpose(1, 2))
        scale = self.log_scale(features).squeeze(-1).clamp(LOWEST_LOG_SCALE, HIGHEST_LOG_SCALE).exp()
        return normalize(self.read(pooled.flatten(1)), dim=-1), scale


class _Block(nn.Module):
    """One layer across tokens, one within each, both behind a norm that the level shifts and scales."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.across = nn.Sequential(nn.Linear(tokens, tokens), nn.GELU(), nn.Linear(tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.condition = nn.Linear(LEVEL_WIDTH, 4 * width)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, N, W), changed."""
        scale, shift, second_scale, second_shift = self.condition(condition)[:, None].chunk(4, dim=-1)
        normed = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + self.across(normed.transpose(1, 2)).transpose(1, 2)
        return x + self.within(layer_norm(x, x.shape[-1:]) * (1 + second_scale) + second_shift)


def level_features(level: Tensor) -> Tensor:
    """cos(pi k level), k = 1 .. 16, of levels (B,): (B, 16)."""
    order = torch.arange(1, LEVEL_FEATURES + 1, device=level.device, dtype=level.dtype)
    return torch.cos(math.pi * order * level[:, None])


def noise_level(alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """How noisy x_t = alpha_t x0 + sigma_t eps is: 2/pi atan2(sigma_t, alpha_t), whatever its scale.

    alpha_t and sigma_t are (B,), >= 0, not both 0: 0 is no noise, 1 no signal, 1/2 where alpha_t = sigma_t.
    """
    return torch.atan2(sigma_t, alpha_t) * (2 / math.pi)


class LatentStepJudge:
    """A step judge from a folder: config.json and model.safetensors, and the CLIP judge that config.json
    names (its `text`, an alias, say, made a folder or hub id by `resolve`).

    Rows are independent, so a score does not depend on its batch (beyond rounding). Always float32.

    Raises:
        MissingError: the folder, a file of it, or its text tower is missing.
        RewardError: it is another kind of model, damaged, or was trained with another text tower.
    """

    def __init__(
        self, folder: str | Path, resolve: Callable[[str], str] = str, device: Device = "cpu"
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.shape = read_shape(self.folder)
        self._device = torch.device(device)
        self._network = _load_network(self.folder, self.shape).to(self._device)
        inside = self.folder / self.shape.text
        text = str(inside) if inside.is_dir() else resolve(self.shape.text)
        self._clip = ClipReward("step judge's text", text, device)
        self._texts: dict[str, Tensor] = {}
        with self._in_full_precision():
            sample, expected = text_sample(self._clip), self.shape.text_sample
        if len(sample) != len(expected) or np.abs(np.subtract(sample, expected)).max() > TEXT_TOLERANCE:
            raise RewardError(
                f"step judge {self.folder}: its text tower {self.shape.text!r} embeds {TEXT_SAMPLE!r} as "
                f"{sample[0]:.4f}, {sample[1]:.4f}, ..., expected text_sample "
                f"{', '.join(f'{value:.4f}' for value in expected[:2])}, ...: it is not the tower that the "
                "judge was trained with; name that one, or train the judge again"
            )

    def check_fits(self, latent_shape: Sequence[int], path_kind: str, key: str, model: str) -> None:
        """Refuse, with a ConfigError, a model of another `latent_shape` (C, h, w), or of a path that this
        judge was not trained on; `key` is the setting that names the judge."""
        own, paths = self.shape.latent_shape, self.shape.paths
        wrong = ""
        if tuple(latent_shape) != own:
            wrong = (
                f"it reads latents {_by(own)}, but {model} has {_by(latent_shape)}; expected a judge trained "
                "on this model's latents"
            )
        elif path_kind not in paths:
            wrong = (
                f"it was trained on states of {' and '.join(paths)} models, but {model} is a {path_kind} "
                f"model; expected a judge trained on {path_kind} states"
            )
        if wrong:
            raise ConfigError(f"{key} = {self.folder}: {wrong}, or null (the rewards judge)")

    @torch.no_grad()
    @phase("scoring images")
    def score(
        self, x_t: Tensor, alpha_t: float | Tensor, sigma_t: float | Tensor, prompts: Sequence[str]
    ) -> Tensor:
        """Scores (B,) float32 on the CPU of states x_t (B,C,h,w) at a noise level for their prompts.

        x_t is alpha_t x0 + sigma_t eps; alpha_t and sigma_t are numbers or (B,), >= 0, not both 0.
        Differences between scores of states of one prompt and level are log-odds.

        Raises:
            RewardError: another latent shape, or x_t and prompts differ in number.
        """
        if tuple(x_t.shape[1:]) != self.shape.latent_shape or len(x_t) != len(prompts):
            reason = f"{len(x_t)} states {_by(x_t.shape[1:])} for {len(prompts)} prompts"
            advice = f"expected one state {_by(self.shape.latent_shape)} a prompt"
            raise RewardError(f"step judge {self.folder}: {reason}; {advice}")
        if len(x_t) == 0:
            return torch.zeros(0)
        vectors, scale = self.embed_states(x_t, alpha_t, sigma_t)
        return (scale * (vectors * self.embed_prompts(prompts)).sum(dim=-1)).cpu()

    @torch.no_grad()
    def embed_states(
        self, x_t: Tensor, alpha_t: float | Tensor, sigma_t: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) and scales (B,) of states x_t (B,C,h,w)."""
        x = x_t.to(self._device, torch.float32)
        alpha, sigma = (
            torch.as_tensor(value, dtype=torch.float32, device=self._device).expand(len(x))
            for value in (alpha_t, sigma_t)
        )
        with self._in_full_precision():
            return self._network(
                x / torch.hypot(alpha, sigma)[:, None, None, None], noise_level(alpha, sigma)
            )

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) of texts; each is encoded once and alone, so no text changes another's bits."""
        with self._in_full_precision():
            for prompt in prompts:
                if prompt not in self._texts:
                    self._texts[prompt] = self._clip.embed_prompts([prompt])[0]
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def _in_full_precision(self) -> torch.autocast:
        """The loop may have switched to a lower precision for the denoiser."""
        return torch.autocast(self._device.type, enabled=False)


def read_shape(folder: Path) -> StepJudgeShape:
    """What a folder's config.json says: MissingError without it or model.safetensors, RewardError if it is
    not that of a step judge."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingError(
                f"step judge {folder}: {name} is missing; expected a folder with {CONFIG} and {WEIGHTS}, as "
                "`python -m worlds.emoji train step_judge` writes it, or emoji:step_judge"
            )
    try:
        values = read_json(folder / CONFIG)
        kind = values.pop("kind", values.get("model_type"))
        if kind != KIND:
            expected = f"{KIND!r}; a judge of clean images is a reward, not a step judge"
            raise RewardError(f"step judge {folder}: {CONFIG} is of kind {kind!r}, expected {expected}")
        latent_shape = tuple(int(side) for side in values.pop("latent_shape"))
        sample = tuple(float(value) for value in values.pop("text_sample"))
        shape = StepJudgeShape(latent_shape, tuple(values.pop("paths")), text_sample=sample, **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        advice = f"expected the keys {', '.join(StepJudgeShape.__dataclass_fields__)}"
        raise RewardError(f"step judge {folder}: {CONFIG} cannot be read ({error}); {advice}") from error
    sizes = (*latent_shape, shape.patch, shape.width, shape.hidden, shape.blocks, shape.embedding)
    is_whole = len(latent_shape) == 3 and all(isinstance(size, int) and size >= 1 for size in sizes)
    if not is_whole or any(side % shape.patch for side in latent_shape[1:]):
        raise RewardError(
            f"step judge {folder}: {CONFIG} has latent_shape {_by(latent_shape)}, patch {shape.patch}, width "
            f"{shape.width}, hidden {shape.hidden}, blocks {shape.blocks}, embedding {shape.embedding}; "
            "expected whole numbers above 0, and height and width of the latents divisible by patch"
        )
    return shape


def text_sample(clip: ClipReward) -> tuple[float, ...]:
    """The first 8 numbers of a text tower's vector of TEXT_SAMPLE: a small change of the tower shows."""
    return tuple(round(value, 5) for value in clip.embed_prompts([TEXT_SAMPLE])[0, :8].tolist())


def shape_as_json(shape: StepJudgeShape) -> str:
    """The text of config.json."""
    return json.dumps({"kind": KIND, **asdict(shape)}, indent=2, sort_keys=True) + "\n"


def _load_network(folder: Path, shape: StepJudgeShape) -> StepJudgeNetwork:
    network = StepJudgeNetwork(shape)
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        network.load_state_dict(tensors)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = f"{WEIGHTS} does not hold the network of {CONFIG} ({error})"
        raise RewardError(f"step judge {folder}: {reason}; copy or train it again") from error
    return network.eval().requires_grad_(False)


def _by(sides: Sequence[int]) -> str:
    return "x".join(str(side) for side in sides)
