"""What the policies of all families are made of, and how one is put together from its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from torch import Tensor, nn

from diffexpo.config.families import FAMILIES, Family
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import PolicyError
from diffexpo.phases import phase
from diffexpo.policies.autoencoder import decode_with, encode_with
from diffexpo.policies.loading import (
    DTYPES,
    ModelFolder,
    check_weight_files,
    choose_device,
    component_folder,
    fingerprint_files,
    load_module,
    read_json,
    weight_files,
)
from diffexpo.policies.sizes import latent_size, patch_of
from diffexpo.policies.text import move_modules
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets, make_weights
from diffexpo.types import Conditioning

AnyPolicy = TypeVar("AnyPolicy", bound="FamilyPolicy")
Shape = tuple[int, int, int]
Empty = Callable[..., Tensor]
"""Makes a tensor without values from a shape without the batch."""
Inputs = dict[str, Any]
"""Arguments of a denoiser's forward besides the time, which a family gives the estimate."""


@dataclass(kw_only=True, eq=False, repr=False)
class FamilyPolicy(ABC):
    """A model that can denoise, in parts. See `diffexpo.types.Policy`.

    A family adds its text encoders as fields and says how it encodes one prompt and how it predicts.
    """

    folder: ModelFolder
    path: DiffusionPath
    weights: LoraWeightSets | CopyWeightSets
    vae: nn.Module
    latent_shape: Shape
    fingerprint: str
    dtype: torch.dtype
    device: torch.device

    @property
    def card(self) -> Family:
        """What is known of the family."""
        return FAMILIES[self.folder.pipeline_class]

    @property
    def default_guidance(self) -> float | None:
        """The pipeline's own scale of classifier-free guidance, where another is worth a warning."""
        return self.card.default_guidance

    @property
    def max_tokens(self) -> int:
        """Longest text, marks included, that is read whole: by default, the length that can be set."""
        return self.sequence_length

    @property
    def left_out(self) -> tuple[str, ...]:
        """Components of the folder that this policy runs without."""
        return ()

    @property
    def component_dtypes(self) -> dict[str, torch.dtype]:
        """Components that are held in another precision than the denoiser where plain diffusers draws."""
        return {}

    @phase("encoding prompts")
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser is told of each prompt.

        Each distinct text runs alone, so that its bits never depend on the texts beside it.
        """
        move_modules(self.text_modules(), self.device)
        encoded = {prompt: self.encode_prompt(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def release_text_encoders(self) -> None:
        """Put the text encoders into main memory until the next text is to be encoded."""
        move_modules(self.text_modules(), torch.device("cpu"))

    @phase("encoding pictures")
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w), of an autoencoder with a distribution."""
        return encode_with(self.vae, images)

    @phase("decoding images")
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) to float32 images (B,3,H,W) in [0,1]."""
        return decode_with(self.vae, latents, self.dtype)

    def on_device(self, tensor: Tensor) -> Tensor:
        """A tensor where the denoiser runs, in its type."""
        return tensor.to(self.device, self.dtype)

    @abstractmethod
    def text_modules(self) -> list[nn.Module]:
        """The text encoders in use."""

    @abstractmethod
    def encode_prompt(self, prompt: str) -> Conditioning:
        """What the denoiser is told of one prompt, a batch of one; the encoders are on the device."""


def class_of(name: str) -> type:
    """A network's class by its name in diffusers or transformers."""
    return getattr(diffusers, name, None) or getattr(transformers, name)


def read_path(
    folder: ModelFolder,
    kind: str,
    change: Callable[[Mapping[str, object]], Mapping[str, object]] = dict,
    **settings: Any,
) -> DiffusionPath:
    """The noise path of the folder's scheduler.

    Args:
        folder: The model.
        kind: "vp" or "flow", as the family expects.
        change: What the family's pipeline does to the scheduler's settings when it loads; nothing by default.
        settings: Of `DiffusionPath.from_scheduler_config`: `image_tokens` where the shift may follow from the
            image's size, `lowest_level` of a pipeline that gives the scheduler its own list of levels.
    Raises:
        PolicyError: a scheduler of the other kind (a flow scheduler beside a UNet, say), or one that is not
            reproduced here.
    """
    config_file = component_folder(folder, "scheduler") / "scheduler_config.json"
    path = DiffusionPath.from_scheduler_config(change(read_json(config_file)), **settings)
    if path.kind != kind:
        raise PolicyError(
            f"{config_file}: describes a {path.kind!r} path, expected {kind!r} for a {folder.pipeline_class}"
        )
    return path


@dataclass(frozen=True)
class Loading:
    """A folder that is being loaded, and what was asked for."""

    card: Family
    folder: ModelFolder
    model: ModelConfig
    tuning: TuningConfig
    seed: int
    gradient_checkpointing: bool
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of(
        folder: ModelFolder,
        model: ModelConfig,
        tuning: TuningConfig,
        *,
        seed: int,
        gradient_checkpointing: bool,
    ) -> Loading:
        """With the card that the folder's pipeline class names, on the device and in the type asked for."""
        return Loading(
            FAMILIES[folder.pipeline_class],
            folder,
            model,
            tuning,
            seed,
            gradient_checkpointing,
            choose_device(model.device),
            DTYPES[model.dtype],
        )

    @property
    def where(self) -> str:
        """The model, for messages."""
        return str(self.folder.path)

    def files(self, without: Sequence[str] = ()) -> list[FilePath]:
        """The weight files of all components but some, checked to be whole."""
        components = [name for name in self.card.parts if name not in without]
        files = [
            file
            for component in components
            for file in weight_files(component_folder(self.folder, component), self.folder.variant)
        ]
        check_weight_files(files)
        return files

    def network(self, component: str, dtype: torch.dtype | None = None) -> Any:
        """A network of the folder, by default in the denoiser's type."""
        found = class_of(self.card.parts[component])
        return load_module(found, self.folder, component, dtype or self.dtype, self.device)

    def denoiser(self) -> Any:
        """The network that is trained."""
        return self.network(self.card.denoiser[0])

    def autoencoder(self) -> Any:
        """The autoencoder, in float32: in half precision it overflows for known models."""
        return self.network("vae", torch.float32)

    def latent_size(
        self, sample_size: int | Sequence[int] | None, denoiser: nn.Module, vae: nn.Module
    ) -> Any:
        """(h, w) of the latents in `model.resolution`, or in the checkpoint's own size."""
        patch = patch_of(self.card, denoiser)
        return latent_size(sample_size, vae, self.where, self.model.resolution, patch)

    def policy(
        self,
        policy_class: type[AnyPolicy],
        files: Sequence[FilePath],
        denoiser: nn.Module,
        **fields: Any,
    ) -> AnyPolicy:
        """The policy, with trainable weights on the denoiser."""
        if self.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return policy_class(
            folder=self.folder,
            weights=make_weights(denoiser, self.tuning, self.seed, self.card),
            fingerprint=fingerprint_files(files, self.folder.path),
            dtype=self.dtype,
            device=self.device,
            **fields,
        )
