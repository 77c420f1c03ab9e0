"""The improvement model: a base model whose denoiser also sees an image, as further input channels.

    e(x_t, t, c, image) = network([x_t | condition_scale image], t, c)

The channels of the image start with weight zero, so at the start the model is the base whatever the image.
Image means clean scaled latents, as the base's own; zeros are no image.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from diffexpo.config.schema import TuningConfig
from diffexpo.diffusion.guidance import IMAGE_CONDITION
from diffexpo.errors import PolicyError
from diffexpo.files import write_json
from diffexpo.policies.family import FamilyPolicy, class_of
from diffexpo.policies.loading import ModelFolder, load_module, read_json, read_model_folder
from diffexpo.policies.text import SETTINGS_FILE
from diffexpo.policies.weights import fingerprint_state, make_weights
from diffexpo.types import Conditioning, Policy

IMPROVER_FILE = "improver.json"
FORMAT = 1
WITH_THE_DENOISER = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


class WidenedConv2d(nn.Conv2d):
    """A convolution over [latent | image] that adds up one over each, with the weights of a plain
    `nn.Conv2d`.

    Kernels round by the number of channels; taken apart, the part of the latent has the bits of the unwidened
    network.

    Args:
        plain: Its bias and geometry are taken.
        weight: (out, 2C, k, k).
    """

    def __init__(self, plain: nn.Conv2d, weight: Tensor) -> None:
        # The initialiser of a convolution draws values, which would move the global generator.
        vars(self).update(vars(copy.deepcopy(plain)))
        self.weight, self.in_channels = nn.Parameter(weight), weight.shape[1]
        self.own_channels = weight.shape[1] // 2

    def forward(self, both: Tensor) -> Tensor:
        """Convolution of the latent's channels with bias, plus that of the image's."""
        own = self.own_channels
        latent = self._conv_forward(both[:, :own], self.weight[:, :own].contiguous(), self.bias)
        return latent + self._conv_forward(both[:, own:], self.weight[:, own:].contiguous(), None)


class Improver(FamilyPolicy):
    """Puts the image condition after the noisy latents, and calls a family's own `predict`."""

    condition_scale: float = 1.0

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own output for x_t (B,C,h,w) at t (B,), given text and image."""
        image = conditioning.tensors[IMAGE_CONDITION].to(x_t.device, x_t.dtype)
        inputs = torch.cat([x_t, self.condition_scale * image], dim=1)
        return super().predict(inputs, t, conditioning)


def make_improver(policy: Policy, *, gradient_checkpointing: bool = False) -> Improver:
    """An untrained improvement model: the base's denoiser from its folder, in float32, widened by zeros.

    It shares the base's autoencoder and text encoders, equals the base bit for bit under any image condition,
    and is fully trainable. A family without an improvement model is a PolicyError.
    """
    family = _supported(policy)
    return _improver_of(family, family.folder, gradient_checkpointing, is_wide=False)


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
    for key, expected in _shared_parts(family).items():
        if settings.get(key) != expected:
            raise PolicyError(
                f"{folder}: the improvement model was trained with another {key} than {family.folder.path} "
                "has; expected a model of the same autoencoder and text encoders"
            )
    improver = _improver_of(family, read_model_folder(folder), gradient_checkpointing, is_wide=True)
    improver.condition_scale = float(settings["condition_scale"])
    return improver


def save_improver(improver: Improver, folder: Path) -> Path:
    """Write an improvement model as a diffusers folder: the widened denoiser with the "current" weights, and
    the base's other components as they are. What an interrupted call left in the folder is replaced.

    The denoiser loads in plain diffusers; `improver.json` says what its further channels expect.
    """
    component, base = improver.card.denoiser[0], improver.folder
    others = [name for name in WITH_THE_DENOISER if base.has(name)]
    folder.mkdir(parents=True, exist_ok=True)
    for name in others:
        shutil.copytree(base.path / name, folder / name, dirs_exist_ok=True)
    kept = [key for key in base.index if key.startswith("_") or key in (component, *others)]
    write_json(folder / "model_index.json", {key: base.index[key] for key in kept})
    if (base.path / SETTINGS_FILE).is_file():
        shutil.copy(base.path / SETTINGS_FILE, folder / SETTINGS_FILE)
    with improver.weights.use("current"):
        improver.weights.network.save_pretrained(str(folder / component), safe_serialization=True)
    scale = {"condition": "clean scaled latents", "condition_scale": improver.condition_scale}
    content = {"format": FORMAT, **scale, **_shared_parts(improver), "base": improver.fingerprint}
    write_json(folder / IMPROVER_FILE, content)
    return folder


def _supported(policy: Policy) -> FamilyPolicy:
    """The policy, if there is an improvement model of its family."""
    if not isinstance(policy, FamilyPolicy) or not policy.card.input_convolution:
        raise PolicyError(
            f"{type(policy).__name__}: there is no improvement model of this family; expected a model in the "
            "layout of Stable Diffusion 1.x or 3"
        )
    return policy


def _improver_of(
    policy: FamilyPolicy, folder: ModelFolder, gradient_checkpointing: bool, *, is_wide: bool
) -> Improver:
    """An improvement model of the denoiser in a folder, in float32, widened by zeros unless it is already."""
    (component, class_name), channels = policy.card.denoiser, policy.latent_shape[0]
    network = load_module(class_of(class_name), folder, component, torch.float32, policy.device)
    plain = network.get_submodule(policy.card.input_convolution)
    weight = plain.weight if is_wide else torch.cat([plain.weight, torch.zeros_like(plain.weight)], dim=1)
    if weight.shape[1] != 2 * channels:
        raise PolicyError(
            f"{folder.path / component}: takes {plain.in_channels} channels; expected "
            f"{2 * channels}, latents and an image of {channels} each"
        )
    network.register_to_config(in_channels=2 * channels, out_channels=channels)
    network.set_submodule(policy.card.input_convolution, WidenedConv2d(plain, weight))
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    shared = {field.name: getattr(policy, field.name) for field in fields(policy)}
    weights = make_weights(network, TuningConfig(kind="full"), 0, policy.card)
    shared |= {"weights": weights, "dtype": torch.float32}
    improver: Improver = type("Improver", (Improver, type(policy)), {})(**shared)
    return improver


def _shared_parts(policy: FamilyPolicy) -> dict[str, str]:
    """Fingerprints of what latents and texts mean: autoencoder and text encoders, as in `improver.json`."""
    texts = nn.ModuleList(policy.text_encoders)
    shared = {"autoencoder": policy.vae, "text_encoder": texts}
    return {key: fingerprint_state(module.state_dict()) for key, module in shared.items()}
