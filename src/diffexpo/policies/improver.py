"""The improvement model: a base model whose denoiser also sees an image, as further input channels.

    e(x_t, t, c, image) = network([x_t | condition_scale image], t, c)

The channels of the image start with weight zero, so at the start the model is the base whatever the image.
Image means clean scaled latents, as the base's own; zeros are no image.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from diffexpo.config.families import Family
from diffexpo.config.schema import TuningConfig
from diffexpo.diffusion.guidance import IMAGE_CONDITION
from diffexpo.errors import PolicyError
from diffexpo.policies.family import FamilyPolicy, class_of
from diffexpo.policies.loading import ModelFolder, load_module, read_json, read_model_folder
from diffexpo.policies.sd3 import SD3Policy
from diffexpo.policies.text import SETTINGS_FILE
from diffexpo.policies.unet import UNetPolicy
from diffexpo.policies.weights import fingerprint_state, make_weights
from diffexpo.types import Conditioning, Policy

IMPROVER_FILE = "improver.json"
FORMAT = 1
CONDITION_SCALE = 1.0
FULL = TuningConfig(kind="full")
WITH_THE_DENOISER = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


class WidenedConv2d(nn.Conv2d):
    """A convolution over [latent | image] that adds up one over each, with the weights of a plain
    `nn.Conv2d`.

    Kernels round by the number of channels; taken apart, the part of the latent has the bits of the unwidened
    network.
    """

    own_channels: int

    def forward(self, both: Tensor) -> Tensor:
        """Convolution of the latent's channels with bias, plus that of the image's."""
        own = self.own_channels
        latent = self._conv_forward(both[:, :own], self.weight[:, :own].contiguous(), self.bias)
        return latent + self._conv_forward(both[:, own:], self.weight[:, own:].contiguous(), None)


class TakesImage:
    """Puts the image condition after the noisy latents, and calls a family's own `predict`."""

    condition_scale: float = CONDITION_SCALE

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own output for x_t (B,C,h,w) at t (B,), given text and image."""
        image = conditioning.tensors[IMAGE_CONDITION].to(x_t.device, x_t.dtype)
        inputs = torch.cat([x_t, self.condition_scale * image], dim=1)
        return super().predict(inputs, t, conditioning)  # type: ignore[misc]


class UNetImprover(TakesImage, UNetPolicy):
    """An improvement model in the Stable Diffusion 1.x layout."""


class SD3Improver(TakesImage, SD3Policy):
    """An improvement model in the Stable Diffusion 3 layout."""


Improver = UNetImprover | SD3Improver


def make_improver(policy: Policy, *, gradient_checkpointing: bool = False) -> Improver:
    """An untrained improvement model: the base's denoiser from its folder, in float32, widened by zeros.

    It shares the base's autoencoder and text encoders, equals the base bit for bit under any image condition,
    and is fully trainable. A family without an improvement model is a PolicyError.
    """
    family = _supported(policy)
    network, plain = _read_denoiser(family.folder, family)
    wide = widen(plain, torch.cat([plain.weight, torch.zeros_like(plain.weight)], dim=1))
    network.register_to_config(in_channels=wide.in_channels, out_channels=plain.in_channels)
    return _improver_of(family, network, wide, gradient_checkpointing)


def load_improver(folder: Path, policy: Policy, *, gradient_checkpointing: bool = False) -> Improver:
    """A trained improvement model from the folder that `save_improver` wrote; its "current" weights are
    those of the folder. The policy is of the same family, with the same autoencoder and text encoders, which
    are shared.

    Raises:
        MissingError: a file is not there.
        PolicyError: no improvement model, or one of other latents or texts.
    """
    settings, family = read_json(folder / IMPROVER_FILE), _supported(policy)
    if settings.get("format") != FORMAT:
        raise PolicyError(
            f"{folder / IMPROVER_FILE}: format is {settings.get('format')!r}, this version reads {FORMAT}; "
            "train it again"
        )
    for key, module in _shared_modules(family).items():
        if settings.get(key) != fingerprint_state(module.state_dict()):
            raise PolicyError(
                f"{folder}: the improvement model was trained with another {key} than {family.folder.path} "
                "has; expected a model of the same autoencoder and text encoders"
            )
    network, plain = _read_denoiser(read_model_folder(folder), family)
    channels = family.latent_shape[0]
    if plain.in_channels != 2 * channels:
        raise PolicyError(
            f"{folder / family.card.denoiser[0]}: takes {plain.in_channels} channels; expected "
            f"{2 * channels}, latents and an image of {channels} each"
        )
    improver = _improver_of(family, network, widen(plain, plain.weight), gradient_checkpointing)
    improver.condition_scale = float(settings["condition_scale"])
    return improver


def save_improver(improver: Improver, folder: Path) -> Path:
    """Write an improvement model as a diffusers folder: the widened denoiser with the "current" weights, and
    the base's other components as they are. What an interrupted call left in the folder is replaced.

    The denoiser loads in plain diffusers; `improver.json` says what its further channels expect.
    """
    component, base = improver.card.denoiser[0], improver.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in WITH_THE_DENOISER:
        if base.has(name):
            shutil.copytree(base.path / name, folder / name, dirs_exist_ok=True)
    kept = {key: value for key, value in base.index.items() if key.startswith("_") or key == component}
    kept |= {name: base.index[name] for name in WITH_THE_DENOISER if base.has(name)}
    _write_json(folder / "model_index.json", kept)
    if (base.path / SETTINGS_FILE).is_file():
        shutil.copy(base.path / SETTINGS_FILE, folder / SETTINGS_FILE)
    with improver.weights.use("current"):
        improver.weights.network.save_pretrained(str(folder / component), safe_serialization=True)
    facts = {key: fingerprint_state(module.state_dict()) for key, module in _shared_modules(improver).items()}
    scale = {"condition": "clean scaled latents", "condition_scale": improver.condition_scale}
    content = {"format": FORMAT, **scale, **facts, "base": improver.fingerprint}
    _write_json(folder / IMPROVER_FILE, content)
    return folder


def input_convolution(network: ModelMixin, card: Family) -> nn.Conv2d:
    """The convolution that reads latents: a UNet's first one, a transformer's patch embedding."""
    return network.get_submodule(card.input_convolution)


def widen(plain: nn.Conv2d, weight: Tensor) -> WidenedConv2d:
    """A widened convolution with the given weight (out, 2C, k, k) and the plain one's bias and geometry."""
    # Without the random initial values, which would move the global generator.
    wide = nn.utils.skip_init(
        WidenedConv2d,
        weight.shape[1],
        plain.out_channels,
        plain.kernel_size,
        stride=plain.stride,
        padding=plain.padding,
        dilation=plain.dilation,
        bias=plain.bias is not None,
        device=plain.weight.device,
        dtype=plain.weight.dtype,
    )
    wide.own_channels = weight.shape[1] // 2
    with torch.no_grad():
        wide.weight.copy_(weight)
        if plain.bias is not None:
            wide.bias.copy_(plain.bias)
    return wide


def _supported(policy: Policy) -> FamilyPolicy:
    """The policy, if there is an improvement model of its family."""
    if not isinstance(policy, FamilyPolicy) or not policy.card.input_convolution:
        raise PolicyError(
            f"{type(policy).__name__}: there is no improvement model of this family; expected a model in the "
            "layout of Stable Diffusion 1.x or 3"
        )
    return policy


def _read_denoiser(folder: ModelFolder, policy: FamilyPolicy) -> tuple[ModelMixin, nn.Conv2d]:
    """The denoiser of a folder in float32, and its convolution that reads latents."""
    component, class_name = policy.card.denoiser
    network = load_module(class_of(class_name), folder, component, torch.float32, policy.device)
    return network, input_convolution(network, policy.card)


def _improver_of(
    policy: FamilyPolicy, network: ModelMixin, wide: WidenedConv2d, gradient_checkpointing: bool
) -> Improver:
    network.set_submodule(policy.card.input_convolution, wide)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    shared = {field.name: getattr(policy, field.name) for field in fields(policy)}
    shared |= {"weights": make_weights(network, FULL, 0, policy.card), "dtype": torch.float32}
    return (UNetImprover if isinstance(policy, UNetPolicy) else SD3Improver)(**shared)


def _shared_modules(policy: FamilyPolicy) -> dict[str, nn.Module]:
    """What latents and texts mean: autoencoder and text encoders, by their names in `improver.json`."""
    return {"autoencoder": policy.vae, "text_encoder": nn.ModuleList(policy.text_encoders)}


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
