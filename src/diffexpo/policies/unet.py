"""UNet latent diffusion in the Stable Diffusion 1.x and 2.x layout (eps, v or x0 prediction)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    move_modules,
    read_json,
    weight_files,
)
from diffexpo.policies.sizes import checked_size, vae_factor
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "StableDiffusionPipeline"
# Pictures the autoencoder decodes in one call: few enough for a CPU's cache (a quarter faster than 64) and a
# GPU's memory.
DECODE_BATCH = 16
# Settings of a UNet that mean one more input, and what it is.
FURTHER_INPUTS = {
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "time_cond_proj_dim": "a guidance scale (a distilled model)",
    "encoder_hid_dim_type": "an image",
}
EARLY_VERSIONS = tuple(f"0.{minor}." for minor in range(9))


def make_weights(
    network: nn.Module, tuning: TuningConfig, seed: int, inert: tuple[str, ...] = ()
) -> LoraWeightSets | CopyWeightSets:
    """Adapters or copies on a denoiser, as the tuning kind says; `inert` parameters cannot get a gradient."""
    if tuning.kind == "lora":
        return LoraWeightSets(network, tuning.lora, seed)
    return CopyWeightSets(
        network,
        inert,
        reference_dtype=DTYPES[tuning.reference_dtype],
        parks_copies=tuning.reference_device == "cpu",
    )


def read_path(
    folder: ModelFolder,
    kind: str,
    change: Callable[[Mapping[str, object]], dict[str, object]] = dict,
) -> DiffusionPath:
    """The noise path of the folder's scheduler.

    Args:
        folder: The model.
        kind: "vp" or "flow", as the family expects.
        change: What the family's pipeline does to the scheduler's settings when it loads; nothing by default.
    Returns:
        The path.
    Raises:
        PolicyError: a scheduler of the other kind (a flow scheduler beside a UNet, say).
    """
    config_file = component_folder(folder, "scheduler") / "scheduler_config.json"
    path = DiffusionPath.from_scheduler_config(change(read_json(config_file)))
    if path.kind != kind:
        raise PolicyError(
            f"{config_file}: describes a {path.kind!r} path, expected {kind!r} for a {folder.pipeline_class}"
        )
    return path


def as_the_pipeline_reads(scheduler: Mapping[str, object]) -> dict[str, object]:
    """Scheduler settings as StableDiffusionPipeline changes them when it loads: offset 1, and nothing is
    clipped.

    Files of early checkpoints lack both fields, and the scheduler classes' own defaults are others.

    Args:
        scheduler: Content of `scheduler_config.json`.
    Returns:
        The settings that the pipeline samples with.
    Source: the constructor of diffusers' StableDiffusionPipeline. StableDiffusionXLPipeline changes nothing.
    """
    return {**scheduler, "steps_offset": 1, "clip_sample": False}


def decode_with(vae: AutoencoderKL, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scaled latents (B,C,h,w) to float32 images (B,3,H,W) clamped to [0, 1].

    Args:
        vae: The autoencoder.
        latents: What was drawn.
        dtype: Type of the denoiser that drew them. In half precision a value beyond its range spoils a
            picture, so that the latents are looked at here, once a batch; in float32 a picture that is not
            finite is excluded where it is scored.
    Returns:
        The images.
    Raises:
        PolicyError: a half-precision denoiser gave values that are not finite.
    """
    if dtype != torch.float32:
        check_finite(latents, dtype)
    shift = vae.config.get("shift_factor") or 0.0
    unscaled = latents.to(vae.dtype) / vae.config.scaling_factor + shift
    with torch.no_grad():
        decoded = torch.cat([vae.decode(few, return_dict=False)[0] for few in unscaled.split(DECODE_BATCH)])
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def check_finite(latents: Tensor, dtype: torch.dtype) -> None:
    """Refuse latents of a half-precision denoiser that are not finite.

    Raises:
        PolicyError: says how many pictures are spoilt and what to do.
    """
    spoilt = ~torch.isfinite(latents).flatten(1).all(dim=1)
    if bool(spoilt.any()):
        name = str(dtype).removeprefix("torch.")
        others = "bfloat16 (its range is that of float32) or float32" if dtype == torch.float16 else "float32"
        raise PolicyError(
            f"model.dtype={name}: the denoiser gave values that are not finite in {int(spoilt.sum())} of "
            f"{len(latents)} pictures; expected finite latents. Set model.dtype to {others}; if it persists "
            f"there, "
            "training has diverged: lower training.learning_rate or algorithm.beta"
        )


def encode_with(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w), posterior mean (no random number)."""
    shift = vae.config.shift_factor or 0.0
    with torch.no_grad():
        posterior = vae.encode(images.to(vae.device, vae.dtype) * 2 - 1).latent_dist
    return (posterior.mode() - shift) * vae.config.scaling_factor


def latent_shape_of(
    config: FrozenDict,
    vae: AutoencoderKL,
    where: str,
    *,
    resolution: int | tuple[int, int] | None = None,
    patch: int = 1,
) -> tuple[int, int, int]:
    """(C, h, w) of the denoiser's latents, checked against the autoencoder.

    Args:
        config: The denoiser's: `in_channels`, `out_channels`, `sample_size`.
        vae: Its channels and the factor between pixels and latents.
        where: The model, for messages.
        resolution: `model.resolution` in pixels; None takes the denoiser's `sample_size`.
        patch: Latents that the denoiser takes together in each direction; 1 for UNets.
    Returns:
        The shape; 512 pixels of SD 1.5 are (4, 64, 64).
    Raises:
        PolicyError: channel counts differ (an inpainting or editing model), or no size is known.
        ConfigError: the resolution does not divide into whole latents and patches.
    """
    channels = config.in_channels
    if channels != config.out_channels or channels != vae.config.latent_channels:
        raise PolicyError(
            f"{where}: the denoiser takes {channels} and gives {config.out_channels} channels, the "
            f"autoencoder has {vae.config.latent_channels}; expected all equal (inpainting and editing "
            "models are not supported)"
        )
    return (channels, *latent_size(config.get("sample_size"), vae, where, resolution, patch))


def latent_size(
    sample_size: int | Sequence[int] | None,
    vae: AutoencoderKL,
    where: str,
    resolution: int | tuple[int, int] | None,
    patch: int = 1,
) -> tuple[int, int]:
    """(h, w) in latents; see `latent_shape_of`."""
    if resolution is None:
        if sample_size is None:
            raise PolicyError(
                f"{where}: the denoiser's config.json has no sample_size; set model.resolution (pixels)"
            )
        height, width = (sample_size,) * 2 if isinstance(sample_size, int) else tuple(sample_size)
        return height, width
    factor = vae_factor(vae)
    height, width = checked_size(resolution, factor * patch, where)
    return height // factor, width // factor


def unet_shape_of(
    unet: UNet2DConditionModel, vae: AutoencoderKL, folder: ModelFolder, model: ModelConfig
) -> tuple[int, int, int]:
    """(C, h, w) of a UNet's latents, after checking that nothing but latents, time and text is fed to it.

    Raises:
        PolicyError: a UNet that is also fed a class, a guidance scale or an image.
        ConfigError: the resolution does not divide.
    """
    for key, what in FURTHER_INPUTS.items():
        if unet.config.get(key) is not None:
            raise PolicyError(
                f"{folder.path}: unet.{key}={unet.config[key]!r}, so the network is also fed {what}; "
                f"expected a "
                "text-to-image UNet that takes latents, time and text"
            )
    config = dict(unet.config)
    size = config.get("sample_size")
    # diffusers corrects the files of its first releases, which name a size no checkpoint was trained at.
    is_early = str(config.get("_diffusers_version", "1")).startswith(EARLY_VERSIONS)
    if folder.pipeline_class == PIPELINE and is_early and isinstance(size, int) and size < 64:
        config["sample_size"] = 64
    return latent_shape_of(FrozenDict(config), vae, str(folder.path), resolution=model.resolution)


class UNetPolicy:
    """A Stable Diffusion 1.x or 2.x model that can denoise. See `diffexpo.types.Policy`."""

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
        move_modules([self.text_encoder], self.device)
        states = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning({"encoder_hidden_states": torch.cat([states[prompt] for prompt in prompts])})

    def release_text_encoders(self) -> None:
        """Put the text encoder into main memory until the next text is to be encoded."""
        move_modules([self.text_encoder], torch.device("cpu"))

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
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's own output for x_t (B,C,h,w) at t (B,), in x_t's type."""
        prediction = self.weights.network(
            x_t.to(self.device, self.dtype),
            self.path.timestep(t).to(self.device),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(self.device, self.dtype),
            return_dict=False,
        )[0]
        # Contiguous: with channels-last weights the network's output is not.
        return prediction.to(x_t.dtype).contiguous()


def load(
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
    path = read_path(folder, "vp", as_the_pipeline_reads)
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
    if unet.config.addition_embed_type is not None:
        raise PolicyError(
            f"{folder.path}: unet.addition_embed_type={unet.config.addition_embed_type!r}; a {PIPELINE} "
            f"tells its network "
            "time and text only, expected null (Stable Diffusion XL is a StableDiffusionXLPipeline)"
        )
    latent_shape = unet_shape_of(unet, vae, folder, model)
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
