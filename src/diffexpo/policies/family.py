"""What the policies of all families are made of, and how one is put together from its folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path as FilePath
from typing import Any, ClassVar, TypeVar

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffexpo.config.families import FAMILIES, Family
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.diffusion.scheduler_settings import check_scheduler
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.phases import phase
from diffexpo.policies.autoencoder import decode_with, encode_with
from diffexpo.policies.loading import (
    DTYPES,
    ModelFolder,
    choose_device,
    component_folder,
    fingerprint_files,
    load_module,
    read_json,
    weight_files,
)
from diffexpo.policies.sizes import Shape, latent_shape
from diffexpo.policies.text import LONGEST, count_tokens, fit_tokenizer, load_tokenizer, read_sequence_length
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets, make_weights
from diffexpo.types import Conditioning

AnyPolicy = TypeVar("AnyPolicy", bound="FamilyPolicy")
Empty = Callable[..., Tensor]
"""Makes a tensor without values from a shape without the batch."""
SchedulerChange = Callable[[Mapping[str, object]], Mapping[str, object]]
Inputs = dict[str, Any]
"""Arguments of a denoiser's forward besides the time, which a family gives the estimate."""


@dataclass(kw_only=True, eq=False, repr=False)
class FamilyPolicy(ABC):
    """A model that can denoise, in parts. See `diffexpo.types.Policy`.

    A family says how it encodes one prompt and how its denoiser is called.
    """

    folder: ModelFolder
    path: DiffusionPath
    weights: LoraWeightSets | CopyWeightSets
    vae: ModelMixin
    text_encoders: tuple[PreTrainedModel, ...]
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    latent_shape: Shape
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    sequence_length: int
    latent_shapes: tuple[Shape, ...] = ()
    inference_dtype: torch.dtype | None = None
    """Autocast of forwards without gradient; None is the caller's."""
    keeps_dtypes: ClassVar[bool] = False
    """Whether text encoder and autoencoder keep a precision of their own where plain diffusers draws."""

    @property
    def card(self) -> Family:
        """What is known of the family."""
        return FAMILIES[self.folder.pipeline_class]

    @property
    def text_encoder(self) -> PreTrainedModel:
        """The first text encoder."""
        return self.text_encoders[0]

    @property
    def max_tokens(self) -> int:
        """Longest text, marks included, that is read whole: by default, the length that can be set."""
        return self.sequence_length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, marks included; above `max_tokens` it would be cut."""
        return count_tokens(self.tokenizers, prompts)

    @phase("encoding prompts")
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser is told of each prompt.

        Each distinct text runs alone, so that its bits never depend on the others: in a batch they do, from
        two threads on (CLIP's of 1024 channels by up to 4e-6 of states of 5.6), and which texts would share
        one differs between processes and after a resume.
        """
        self._move_texts(self.device)
        encoded = {prompt: Conditioning(self.encode_prompt(prompt)) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def release_text_encoders(self) -> None:
        """Put the text encoders into main memory until the next text is to be encoded."""
        self._move_texts(torch.device("cpu"))

    def _move_texts(self, device: torch.device) -> None:
        for encoder in self.text_encoders:
            if encoder.device != device:
                encoder.to(device)

    @phase("encoding images")
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w)."""
        return encode_with(self.vae, images)

    @phase("decoding images")
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) to float32 images (B,3,H,W) in [0,1]."""
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own output for x_t (B,C,h,w) at t (B,), in x_t's type."""
        told = conditioning.to(self.device, self.dtype).tensors
        latents, timestep = x_t.to(self.device, self.dtype), self.path.timestep(t).to(self.device)
        with self._inference_precision():
            return self.denoise(latents, timestep, told).to(x_t.dtype)

    def _inference_precision(self) -> AbstractContextManager[None]:
        if self.inference_dtype is None or torch.is_grad_enabled():
            return nullcontext()
        # Each weight is cast once in a forward, so a cache would only hold copies.
        return torch.autocast(self.device.type, dtype=self.inference_dtype, cache_enabled=False)

    @abstractmethod
    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        """What the denoiser is told of one prompt, a batch of one; the encoders are on the device."""

    @abstractmethod
    def denoise(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        """The network's output (B,C,h,w), of latents and texts on the device in its type."""


def class_of(name: str) -> Any:
    """A network's class by its name in diffusers or transformers."""
    return getattr(diffusers, name, None) or getattr(transformers, name)


@dataclass(frozen=True)
class Parts:
    """The networks and tokenizers of a folder, frozen and in eval mode."""

    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    text_encoders: tuple[PreTrainedModel, ...]
    denoiser: ModelMixin
    vae: ModelMixin


@dataclass(frozen=True)
class Loading:
    """A folder that is being loaded, and what was asked for."""

    card: Family
    folder: ModelFolder
    model: ModelConfig
    tuning: TuningConfig
    seed: int
    gradient_checkpointing: bool

    @cached_property
    def device(self) -> torch.device:
        return choose_device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

    @cached_property
    def sequence_length(self) -> int:
        """Tokens of T5, or of what stands in its place, that the denoiser sees."""
        return read_sequence_length(self.folder.path, self.model, self.card.text_tokens)

    @property
    def without(self) -> tuple[str, ...]:
        """Optional components that are not wanted, or that the folder does not have."""
        is_there = self.card.optional and self.folder.has(self.card.optional[0])
        return () if is_there and not self.model.drop_t5 else self.card.optional

    @cached_property
    def files(self) -> list[FilePath]:
        """The weight files of all components in use, checked to be whole."""
        files: list[FilePath] = []
        for component in (name for name in self.card.parts if name not in self.without):
            try:
                files += weight_files(component_folder(self.folder, component), self.folder.variant)
            except MissingError as error:
                if component not in self.card.optional:
                    raise
                raise MissingError(f"{error}, or leave T5 out with model.drop_t5=true") from error
        return files

    def error(self, message: str) -> PolicyError:
        """An error that names the model."""
        return PolicyError(f"{self.folder.path}: {message}")

    def unfitting(self, message: str) -> PolicyError:
        """An error about components that do not fit each other."""
        return self.error(f"{message}; the components belong to different models")

    def path(self, kind: str, change: SchedulerChange = dict, **settings: Any) -> DiffusionPath:
        """The noise path of the folder's scheduler, which the family expects to be of a kind, "vp" or "flow".

        Args:
            change: What the family's pipeline does to the scheduler's settings when it loads.
            settings: Of `DiffusionPath.from_scheduler_config`.
        Raises:
            PolicyError: a scheduler of the other kind (a flow scheduler for a UNet, say), or one that is not
                reproduced here.
        """
        file = component_folder(self.folder, "scheduler") / "scheduler_config.json"
        found = read_json(file)
        try:
            check_scheduler(found)
            path = DiffusionPath.from_scheduler_config(change(found), **settings)
        except PolicyError as error:
            raise PolicyError(f"{file}: {error}") from None
        if path.kind != kind:
            raise PolicyError(
                f"{file}: describes a {path.kind!r} path, expected {kind!r} for a {self.card.pipeline}"
            )
        return path

    def parts(self, text_dtype: torch.dtype | None = None) -> Parts:
        """All networks and tokenizers; the text encoders are in `text_dtype` or the denoiser's, the
        autoencoder in float32: in half precision it overflows for known models.

        Raises:
            ConfigError: no token of T5 is read.
            MissingError: a component or a file of it is not there.
            PolicyError: damaged files, or a tokenizer of another model.
        """
        names = {name: kind for name, kind in self.card.text_encoders.items() if name not in self.without}
        if "T5EncoderModel" in names.values() and self.sequence_length < 1:
            raise ConfigError(
                f"model.max_sequence_length={self.sequence_length}: T5 would read nothing; expected 1 to "
                f"{LONGEST} (zero tokens in T5's place are model.drop_t5=true, for Stable Diffusion 3)"
            )
        load = partial(load_module, model=self.folder, device=self.device)
        tokenizers, encoders = [], []
        for name, kind in names.items():
            component = name.replace("text_encoder", "tokenizer")
            tokenizers.append(load_tokenizer(self.folder, component, kind))
            encoders.append(load(class_of(kind), component=name, dtype=text_dtype or self.dtype))
            fit_tokenizer(tokenizers[-1], encoders[-1], f"{self.folder.path / component}")
        component, kind = self.card.denoiser
        denoiser = load(class_of(kind), component=component, dtype=self.dtype)
        vae = load(class_of(self.card.autoencoder), component="vae", dtype=torch.float32)
        return Parts(tuple(tokenizers), tuple(encoders), denoiser, vae)

    def latent_shape(self, parts: Parts, own: int | Sequence[int] | None = None) -> Shape:
        """(C, h, w) of the latents in `model.resolution`, else in the checkpoint's `own` size in latents,
        which by default the denoiser's file says."""
        return latent_shape(self.card, parts.denoiser, parts.vae, self.model, str(self.folder.path), own)

    def check_states(self, given: int, taken: int, encoder: str = "the text encoder") -> None:
        """Raise PolicyError unless the denoiser takes states as wide as a text encoder gives them."""
        if given != taken:
            raise self.unfitting(f"{encoder} gives states of {given}, the transformer takes {taken}")

    def check_text(self, pooled: int, width: int, config: FrozenDict, *, is_padded: bool = False) -> None:
        """Raise PolicyError unless the denoiser takes a pooled vector and states of these widths; states that
        are padded may be narrower."""
        taken = config.joint_attention_dim
        if pooled != config.pooled_projection_dim or width > taken or (width < taken and not is_padded):
            raise self.unfitting(
                f"the text encoders give pooled {pooled} and states {width}, the transformer takes "
                f"{config.pooled_projection_dim} and {taken}"
            )

    def check_channels(self, parts: Parts) -> None:
        """Raise PolicyError unless the denoiser takes and gives the autoencoder's channels."""
        config, channels = parts.denoiser.config, parts.vae.config.latent_channels
        if not config.in_channels == config.out_channels == channels:
            raise self.error(
                f"the denoiser takes {config.in_channels} and gives {config.out_channels} channels, the "
                f"autoencoder has {channels}; expected all equal (inpainting and editing models are not "
                "supported)"
            )

    def policy(self, policy_class: type[AnyPolicy], parts: Parts, **fields: Any) -> AnyPolicy:
        """The policy, with trainable weights on the denoiser."""
        if self.gradient_checkpointing:
            parts.denoiser.enable_gradient_checkpointing()
        return policy_class(
            folder=self.folder,
            weights=make_weights(parts.denoiser, self.tuning, self.seed, self.card),
            vae=parts.vae,
            text_encoders=parts.text_encoders,
            tokenizers=parts.tokenizers,
            fingerprint=fingerprint_files(self.files, self.folder.path),
            dtype=self.dtype,
            device=self.device,
            sequence_length=self.sequence_length,
            **fields,
        )
