"""UNet latent diffusion in the Stable Diffusion 1.x layout (eps, v or x0 prediction)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import PolicyError
from diffexpo.policies.loading import (
    DTYPES,
    ModelFolder,
    check_weight_files,
    choose_device,
    component_folder,
    count_tokens,
    fingerprint_files,
    load_module,
    load_tokenizer,
    read_json,
    weight_files,
)
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "StableDiffusionPipeline"


def make_weights(
    network: nn.Module, tuning: TuningConfig, seed: int, inert: tuple[str, ...] = ()
) -> LoraWeightSets | CopyWeightSets:
    """Adapters or copies on a denoiser, as the tuning kind says; `inert` parameters cannot get a gradient."""
    if tuning.kind == "lora":
        return LoraWeightSets(network, tuning.lora, seed)
    return CopyWeightSets(network, inert)


def read_path(folder: ModelFolder, kind: str) -> DiffusionPath:
    """The noise path of the folder's scheduler.

    Raises:
        PolicyError: a scheduler of the other kind (a flow scheduler beside a UNet, say).
    """
    config_file = component_folder(folder, "scheduler") / "scheduler_config.json"
    path = DiffusionPath.from_scheduler_config(read_json(config_file))
    if path.kind != kind:
        raise PolicyError(
            f"{config_file}: describes a {path.kind!r} path, expected {kind!r} for a {folder.pipeline_class}"
        )
    return path


def decode_with(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scaled latents (B,C,h,w) to float32 images (B,3,H,W) clamped to [0, 1]."""
    shift = vae.config.shift_factor or 0.0
    with torch.no_grad():
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + shift, return_dict=False)[0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def encode_with(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w), posterior mean (no random number)."""
    shift = vae.config.shift_factor or 0.0
    with torch.no_grad():
        posterior = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist
    return (posterior.mode() - shift) * vae.config.scaling_factor


def latent_shape_of(config: FrozenDict, vae: AutoencoderKL, where: str) -> tuple[int, int, int]:
    """(C, h, w) of the denoiser's latents, checked against the autoencoder.

    Raises:
        PolicyError: channel counts differ (an inpainting or editing model).
    """
    channels = config.in_channels
    if channels != config.out_channels or channels != vae.config.latent_channels:
        raise PolicyError(
            f"{where}: the denoiser takes {channels} and gives {config.out_channels} channels, the "
            f"autoencoder has {vae.config.latent_channels}; expected all equal (inpainting and editing "
            "models are not supported)"
        )
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return (channels, height, width)


class UNetPolicy:
    """A Stable Diffusion 1.x model that can denoise. See `diffexpo.types.Policy`."""

    def __init__(
        self,
        *,
        folder: ModelFolder,
        path: DiffusionPath,
        weights: LoraWeightSets | CopyWeightSets,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        latent_shape: tuple[int, int, int],
        fingerprint: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.path = path
        self.weights = weights
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.latent_shape = latent_shape
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.device = device
        self.max_tokens: int = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, start and end included; above `max_tokens` the text encoder would cut it."""
        return count_tokens(self.tokenizer, prompts)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Last hidden states (B, max_tokens, D) of the text encoder, as the pipeline makes them for one
        prompt.

        Each distinct text runs alone, so that its bits never depend on the texts beside it.
        """
        states = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning({"encoder_hidden_states": torch.cat([states[prompt] for prompt in prompts])})

    def _encode(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if self.text_encoder.config.to_dict().get("use_attention_mask"):
            mask = tokens.attention_mask.to(self.device)
        with torch.no_grad():
            return self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]

    def encode_images(self, images: Tensor) -> Tensor:
        return encode_with(self.vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's own output for x_t (B,C,h,w) at t (B,), in x_t's type."""
        prediction = self.weights.network(
            x_t.to(self.device, self.dtype),
            self.path.timestep(t).to(self.device),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return prediction.to(x_t.dtype)


def load_unet(
    folder: ModelFolder,
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
) -> UNetPolicy:
    """Load a StableDiffusionPipeline folder by components (safety checker and feature extractor are left
    out).
    """
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    path = read_path(folder, "vp")
    files = [
        file
        for component in ("text_encoder", "unet", "vae")
        for file in weight_files(component_folder(folder, component), folder.variant)
    ]
    check_weight_files(files)
    tokenizer = load_tokenizer(folder, "tokenizer")
    text_encoder = load_module(CLIPTextModel, folder, "text_encoder", dtype, device)
    unet = load_module(UNet2DConditionModel, folder, "unet", dtype, device)
    # The autoencoder stays in float32: in half precision it overflows for known models.
    vae = load_module(AutoencoderKL, folder, "vae", torch.float32, device)
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise PolicyError(
            f"{folder.path}: unet.cross_attention_dim={unet.config.cross_attention_dim} but the text encoder "
            f"gives {text_encoder.config.hidden_size}; the components belong to different models"
        )
    latent_shape = latent_shape_of(unet.config, vae, str(folder.path))
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return UNetPolicy(
        folder=folder,
        path=path,
        weights=make_weights(unet, tuning, seed),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        latent_shape=latent_shape,
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
    )
