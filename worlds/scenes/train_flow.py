"""Trains the rectified-flow base: text encoders and an SD3 transformer together, from data or by distilling
the diffusion base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffexpo.errors import ConfigError
from worlds.emoji.fit import autocast, choose_device
from worlds.emoji.layout import save_flow
from worlds.emoji.train_diffusion import read_weights, shuffled, stratified
from worlds.emoji.train_flow import FoldedContextProcessor
from worlds.scenes.fit import Schedule, fit
from worlds.scenes.models import (
    make_flow_text_encoders,
    make_flow_transformer,
    make_schedule,
    make_tokenizer,
)
from worlds.scenes.train_diffusion import LatentScenes

BATCH = 64
LEARNING_RATE = 1.5e-3
IMAGES = 40_000
TIME_MEAN, TIME_DEVIATION = 0.4, 1.0
"""Of the normal distribution of log(t / (1 - t))."""
SHORTEST, LONGEST_TAUGHT = 0.02, 0.93
"""Lowest t of the training, and highest t at which the teacher is asked."""
WORTH_COMPILING = 1000
"""Steps from which the minute that compiling takes pays."""


def flow_times(num: int, noise: torch.Generator) -> Tensor:
    """Draw t (num,) = sigmoid of a normal number, one in each of `num` slices of equal probability."""
    slices = stratified(num, noise).clamp(1e-4, 1 - 1e-4)
    t = torch.sigmoid(TIME_MEAN + TIME_DEVIATION * torch.special.ndtri(slices))
    return shuffled(t, noise).clamp(min=SHORTEST)


def noisier(x_t: Tensor, t: Tensor, later: Tensor, eps: Tensor) -> Tensor:
    """Take flow states from t to `later` >= t by adding noise: what x0 gives at `later`, in distribution.

    a x_t + sqrt(later^2 - a^2 t^2) eps with a = (1 - later) / (1 - t); x_t itself where the times are equal.

    Args:
        x_t: (B,C,h,w) states (1 - t) x0 + t eps'. t, later: (B,) in [0, 1). eps: (B,C,h,w) other noise.
    """
    kept = (1 - later) / (1 - t)
    added = (later.square() - (kept * t).square()).clamp(min=0).sqrt()
    return _wide(kept) * x_t + _wide(added) * eps


def teacher_timesteps(t: Tensor, alpha_bars: Tensor) -> Tensor:
    """Timesteps (B,), between the integers too, at which a diffusion model sees the signal to noise of flow
    time t.

    (1 - t)^2 / t^2 = alpha_bar / (1 - alpha_bar), interpolated in the logarithm and held at both ends.

    Args:
        t: (B,) in (0, 1). alpha_bars: (T,) of the model's schedule, falling.
    """
    levels = torch.log((1 - alpha_bars) / alpha_bars)
    wanted = 2 * torch.log(t / (1 - t)).to(levels)
    above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)


def teacher_x0(v_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The clean latents that a prediction of v says of a flow state.

    x0_hat = (1 - t) x_t / n^2 - t v_hat / n. With n = sqrt((1 - t)^2 + t^2) the prediction is made at
    x_t / n, whose alpha is (1 - t) / n and whose sigma is t / n; x0 = alpha x - sigma v there. With the true
    v this is x0 exactly.
    """
    squares = (1 - t).square() + t.square()
    return _wide((1 - t) / squares) * x_t - _wide(t * squares.rsqrt()) * v_hat


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


class Teacher:
    """A diffusion base (StableDiffusionPipeline folder) that tells the expected clean latents of a state.

    Raises:
        ConfigError: its network predicts something else than v.
    """

    def __init__(self, folder: Path, is_compiled: bool) -> None:
        kind = DDIMScheduler.from_pretrained(folder / "scheduler").config.prediction_type
        if kind != "v_prediction":
            raise ConfigError(
                f"teacher {folder} predicts {kind!r} - expected a base of `train diffusion`, which predicts v"
            )
        self.device = choose_device()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").to(self.device).eval()
        self.text_encoder.set_attn_implementation("eager")
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(self.device).eval()
        unet.set_attn_processor(AttnProcessor())
        self.denoise = torch.compile(unet) if is_compiled else unet
        self.alpha_bars = make_schedule().alphas_cumprod.double()

    @torch.no_grad()
    def x0(self, x_t: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """Expected clean latents (B,C,h,w) of flow states at t (B,) in (0, 1), without guidance."""
        scale = _wide(((1 - t).square() + t.square()).rsqrt())
        timesteps = teacher_timesteps(t, self.alpha_bars).float()
        ids = token_ids(self.tokenizer, captions).to(self.device)
        with autocast(self.device):
            states = self.text_encoder(ids).last_hidden_state
            v_hat = self.denoise((x_t * scale).to(self.device), timesteps.to(self.device), states).sample
        return teacher_x0(v_hat.float().cpu(), x_t, t)


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Ids (B, L) of captions, padded to the tokenizer's length."""
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids


class FlowModel(nn.Module):
    """The text encoders and the transformer of the flow base, which predict the velocity together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder, self.text_encoder_2 = make_flow_text_encoders(tokenizer)
        self.transformer = make_flow_transformer()
        for encoder in (self.text_encoder, self.text_encoder_2):
            encoder.set_attn_implementation("eager")

    def start_from(self, folder: Path) -> None:
        """Take the weights of a flow base."""
        for name in ("text_encoder", "text_encoder_2"):
            getattr(self, name).load_state_dict(read_weights(folder / name / "model.safetensors"))
        weights = read_weights(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        self.transformer.load_state_dict(weights)

    @torch.no_grad()
    def read_like(self, text_encoder: CLIPTextModel) -> None:
        """Take the text encoder of a diffusion base; the layer that the first encoder has more starts as the
        identity, so that the pooled text starts as that encoder's last states."""
        weights = {
            f"text_model.{name.removeprefix('text_model.')}": value
            for name, value in text_encoder.state_dict().items()
        }
        self.text_encoder.load_state_dict(self.text_encoder.state_dict() | weights)
        last = self.text_encoder.text_model.encoder.layers[-1]
        for layer in (last.self_attn.out_proj, last.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Context (B, L, D) and pooled text (B, P) as the pipeline makes them without tokens of a T5."""
        ids = token_ids(self.tokenizer, captions).to(self.transformer.device)
        outputs = [net(ids, output_hidden_states=True) for net in (self.text_encoder, self.text_encoder_2)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return states, torch.cat([output.text_embeds for output in outputs], dim=-1)


def train_flow(
    steps: int,
    out: Path,
    seed: int,
    vae: AutoencoderKL,
    start: Path | None,
    teacher: Path | None = None,
    num_images: int = IMAGES,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Train for so many steps of `BATCH` and save the StableDiffusion3Pipeline folder.

    The loss is the squared error of the velocity at x_t = (1 - t) x0 + t eps. Its target is (x_t - x0) / t =
    eps - x0 of the data or, with a teacher, with the teacher's expectation of x0 in place of x0: the same
    mean where the teacher is right, with far less variance. Above `LONGEST_TAUGHT`, where the error of a
    noise prediction explodes in x0 and beyond which its schedule does not go, the teacher is asked at that
    time and noise is added after, which leaves the mean right. The state for going on lies beside the folder,
    in `<out>.state.safetensors`.

    Args:
        start: folder of a flow base whose weights are the start. teacher: folder of a diffusion base with the
        same autoencoder; without `start` its text encoder is the start of the first one.
    """
    torch.manual_seed(seed)
    device = choose_device()
    is_compiled = steps >= WORTH_COMPILING
    taught = Teacher(teacher, is_compiled) if teacher is not None else None
    model = FlowModel(make_tokenizer())
    if start is not None:
        model.start_from(start)
    elif taught is not None:
        model.read_like(taught.text_encoder)
    model.to(device)
    # Plain matrix products with nothing folded: in bfloat16 on a CPU faster than the fused kernel.
    model.transformer.set_attn_processor(FoldedContextProcessor(num_equal=1))
    velocity_of = torch.compile(model.transformer) if is_compiled else model.transformer
    data = LatentScenes(vae.to(device).eval(), num_images, seed)

    def loss_of(step: int) -> Tensor:
        rng, noise = (
            np.random.default_rng([seed, 4, step]),
            torch.Generator().manual_seed(seed * 10**7 + step),
        )
        x0, captions = data.draw(BATCH, rng, noise)
        t = flow_times(BATCH, noise)
        asked = t.clamp(max=LONGEST_TAUGHT)
        x_asked = _wide(1 - asked) * x0 + _wide(asked) * torch.randn(x0.shape, generator=noise)
        x_t = noisier(x_asked, asked, t, torch.randn(x0.shape, generator=noise))
        if taught is not None:
            x0 = taught.x0(x_asked, asked, captions)
        target = (x_t - x0) / _wide(t)
        with autocast(device):
            context, pooled = model.encode(captions)
            velocity = velocity_of(x_t.to(device), context, pooled, (1000 * t).to(device), return_dict=False)[
                0
            ]
        return (velocity.float() - target.to(device)).square().mean()

    def snapshot() -> None:
        encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection] = (
            model.text_encoder,
            model.text_encoder_2,
        )
        save_flow(vae, encoders, model.tokenizer, model.transformer, out)
        (out / "diffexpo.json").write_text(json.dumps({"max_sequence_length": 0}) + "\n", encoding="utf-8")

    fit(
        "flow",
        model,
        loss_of,
        Schedule(steps, learning_rate),
        out.with_name(f"{out.name}.state.safetensors"),
        snapshot,
        matrices_of="transformer.transformer_blocks.",
    )
