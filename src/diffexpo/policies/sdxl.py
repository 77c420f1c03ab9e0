"""UNet latent diffusion in the Stable Diffusion XL layout: two text encoders, a pooled vector and the
picture's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
    weight_files,
)
from diffexpo.policies.sizes import vae_factor
from diffexpo.policies.unet import (
    decode_with,
    encode_with,
    make_weights,
    read_path,
    unet_shape_of,
)
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "StableDiffusionXLPipeline"
# Original height and width, top and left of the crop, target height and width.
NUM_TIME_IDS = 6


class SDXLPolicy:
    """A Stable Diffusion XL base model that can denoise. See `diffexpo.types.Policy`."""

    def __init__(
        self,
        *,
        folder: ModelFolder,
        path: DiffusionPath,
        weights: LoraWeightSets | CopyWeightSets,
        vae: AutoencoderKL,
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        latent_shape: tuple[int, int, int],
        is_empty_zero: bool,
        fingerprint: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.folder = folder
        self.path = path
        self.weights = weights
        self.vae = vae
        self.text_encoders = text_encoders
        self.tokenizers = tokenizers
        self.latent_shape = latent_shape
        self.is_empty_zero = is_empty_zero
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.device = device
        self.max_tokens: int = min(
            *(tokenizer.model_max_length for tokenizer in tokenizers),
            *(encoder.config.max_position_embeddings for encoder in text_encoders),
        )

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt (the larger of the two tokenizers), start and end included."""
        first, second = (count_tokens(tokenizer, prompts) for tokenizer in self.tokenizers)
        return [max(pair) for pair in zip(first, second, strict=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Both encoders' penultimate states (B, max_tokens, D1 + D2) and the second one's pooled projection
        (B, P).

        Each distinct text runs alone, so that its bits never depend on the texts beside it. The empty prompt
        is what guidance sets against the prompt: zeros if the model's `force_zeros_for_empty_prompt` says so,
            as in the pipeline.
        """
        move_modules(self.text_encoders, self.device)
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def release_text_encoders(self) -> None:
        """Put the text encoders into main memory until the next text is to be encoded."""
        move_modules(self.text_encoders, torch.device("cpu"))

    def _encode(self, prompt: str) -> Conditioning:
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                [prompt],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        tensors = {"encoder_hidden_states": torch.cat(states, dim=-1), "add_text_embeds": pooled}
        if self.is_empty_zero and prompt == "":
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        return Conditioning(tensors)

    def time_ids(self, x_t: Tensor) -> Tensor:
        """The picture's size (B, 6) as the network is told it: original height and width, crop at (0, 0),
        target size.

        It follows from x_t (B,C,h,w), because pictures of a run may differ in size.
        """
        height, width = (side * vae_factor(self.vae) for side in x_t.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(len(x_t), -1)

    def encode_images(self, images: Tensor) -> Tensor:
        return encode_with(self.vae, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's own output for x_t (B,C,h,w) at t (B,), in x_t's type."""
        given = {name: tensor.to(self.device, self.dtype) for name, tensor in conditioning.tensors.items()}
        prediction = self.weights.network(
            x_t.to(self.device, self.dtype),
            self.path.timestep(t).to(self.device),
            encoder_hidden_states=given["encoder_hidden_states"],
            added_cond_kwargs={
                "text_embeds": given["add_text_embeds"],
                "time_ids": self.time_ids(x_t).to(self.dtype),
            },
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
) -> SDXLPolicy:
    """Load a StableDiffusionXLPipeline folder by components; image encoder and refiner are not part of it."""
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    path = read_path(folder, "vp")
    files = [
        file
        for component in ("text_encoder", "text_encoder_2", "unet", "vae")
        for file in weight_files(component_folder(folder, component), folder.variant)
    ]
    check_weight_files(files)
    tokenizers = (load_tokenizer(folder, "tokenizer"), load_tokenizer(folder, "tokenizer_2"))
    encoders = (
        load_module(CLIPTextModel, folder, "text_encoder", dtype, device),
        load_module(CLIPTextModelWithProjection, folder, "text_encoder_2", dtype, device),
    )
    unet = load_module(UNet2DConditionModel, folder, "unet", dtype, device)
    # The autoencoder stays in float32: the published one overflows in half precision.
    vae = load_module(AutoencoderKL, folder, "vae", torch.float32, device)
    check_components(unet, encoders, tokenizers, vae, folder)
    latent_shape = unet_shape_of(unet, vae, folder, model)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return SDXLPolicy(
        folder=folder,
        path=path,
        weights=make_weights(unet, tuning, seed),
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        latent_shape=latent_shape,
        is_empty_zero=bool(folder.index.get("force_zeros_for_empty_prompt", True)),
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
    )


def check_components(
    unet: UNet2DConditionModel,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    vae: AutoencoderKL,
    folder: ModelFolder,
) -> None:
    """Refuse components that do not fit each other.

    Raises:
        PolicyError: widths differ, the UNet is not told text and size (or as the refiner is), or the
            autoencoder's latents are shifted channel by channel.
    """
    config = unet.config
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if config.cross_attention_dim != width:
        raise PolicyError(
            f"{folder.path}: unet.cross_attention_dim={config.cross_attention_dim} but the two text encoders "
            f"give "
            f"{width}; the components belong to different models"
        )
    if config.addition_embed_type != "text_time":
        raise PolicyError(
            f"{folder.path}: unet.addition_embed_type={config.addition_embed_type!r}; expected 'text_time', "
            f"as of a Stable "
            "Diffusion XL base model"
        )
    told = encoders[1].config.projection_dim + NUM_TIME_IDS * config.addition_time_embed_dim
    if config.projection_class_embeddings_input_dim != told:
        raise PolicyError(
            f"{folder.path}: the UNet is told {config.projection_class_embeddings_input_dim} numbers on text "
            f"and size, the "
            f"second text encoder and {NUM_TIME_IDS} sizes give {told}; expected a base model and its own "
            f"text encoders (a "
            "refiner takes 5 sizes)"
        )
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if lengths[0] != lengths[1]:
        raise PolicyError(
            f"{folder.path}: the tokenizers cut at {lengths[0]} and {lengths[1]} tokens; expected one "
            f"length, their states "
            "stand side by side"
        )
    if vae.config.get("latents_mean") is not None:
        raise PolicyError(
            f"{folder.path}: vae.latents_mean is set; latents that are shifted channel by channel are not "
            f"supported, expected "
            "a scaling_factor alone"
        )
