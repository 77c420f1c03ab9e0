"""UNet latent diffusion in the Stable Diffusion XL layout: two text encoders, a pooled vector and the image's
size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffexpo.errors import PolicyError
from diffexpo.policies import unet as plain
from diffexpo.policies.autoencoder import vae_factor
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Shape, read_path
from diffexpo.policies.text import clip_states, count_tokens, load_tokenizer
from diffexpo.types import Conditioning

# Original height and width, top and left of the crop, target height and width.
NUM_TIME_IDS = 6


@dataclass(kw_only=True, eq=False, repr=False)
class SDXLPolicy(FamilyPolicy):
    """A Stable Diffusion XL base model. The denoiser is told both encoders' penultimate states (B,
    max_tokens, D1 + D2) and the second one's pooled projection (B, P).

    The empty prompt is what guidance sets against the prompt: zeros if the model's
    `force_zeros_for_empty_prompt` says so, as in the pipeline.
    """

    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    is_empty_zero: bool

    @property
    def max_tokens(self) -> int:
        """Longest text, marks included, that is read whole."""
        return min(
            *(tokenizer.model_max_length for tokenizer in self.tokenizers),
            *(encoder.config.max_position_embeddings for encoder in self.text_encoders),
        )

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt (the larger of the two tokenizers), start and end included."""
        return count_tokens(self.tokenizers, prompts)

    def text_modules(self) -> list[nn.Module]:
        return list(self.text_encoders)

    def encode_prompt(self, prompt: str) -> Conditioning:
        states, (_, pooled) = clip_states(self.tokenizers, self.text_encoders, prompt, self.device)
        tensors = {"encoder_hidden_states": states, "add_text_embeds": pooled}
        if self.is_empty_zero and prompt == "":
            tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        return Conditioning(tensors)

    def time_ids(self, x_t: Tensor) -> Tensor:
        """The image's size (B, 6) as the network is told it: original height and width, crop at (0, 0),
        target size.

        It follows from x_t (B,C,h,w), because images of a run may differ in size.
        """
        height, width = (side * vae_factor(self.vae) for side in x_t.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(len(x_t), -1)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's own output for x_t (B,C,h,w) at t (B,), in x_t's type."""
        prediction = self.weights.network(
            self.on_device(x_t),
            self.path.timestep(t).to(self.device),
            encoder_hidden_states=self.on_device(conditioning.tensors["encoder_hidden_states"]),
            added_cond_kwargs={
                "text_embeds": self.on_device(conditioning.tensors["add_text_embeds"]),
                "time_ids": self.time_ids(x_t).to(self.dtype),
            },
            return_dict=False,
        )[0]
        # Contiguous: with channels-last weights the network's output is not.
        return prediction.to(x_t.dtype).contiguous()


def load(ask: Loading) -> SDXLPolicy:
    """Load a StableDiffusionXLPipeline folder by components; image encoder and refiner are not part of it."""
    folder = ask.folder
    path, files = read_path(folder, "vp"), ask.files()
    tokenizers = (load_tokenizer(folder, "tokenizer"), load_tokenizer(folder, "tokenizer_2"))
    encoders = (ask.network("text_encoder"), ask.network("text_encoder_2"))
    unet, vae = ask.denoiser(), ask.autoencoder()
    check_components(unet, encoders, tokenizers, vae, ask.where)
    return ask.policy(
        SDXLPolicy,
        files,
        unet,
        path=path,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        latent_shape=plain.unet_shape_of(unet.config, vae, ask),
        is_empty_zero=bool(folder.index.get("force_zeros_for_empty_prompt", True)),
    )


def check_components(
    unet: UNet2DConditionModel,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    vae: AutoencoderKL,
    where: str,
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
            f"{where}: unet.cross_attention_dim={config.cross_attention_dim} but the two text encoders give "
            f"{width}; the components belong to different models"
        )
    if config.addition_embed_type != "text_time":
        raise PolicyError(
            f"{where}: unet.addition_embed_type={config.addition_embed_type!r}; expected 'text_time', as of "
            "a Stable Diffusion XL base model"
        )
    told = encoders[1].config.projection_dim + NUM_TIME_IDS * config.addition_time_embed_dim
    if config.projection_class_embeddings_input_dim != told:
        raise PolicyError(
            f"{where}: the UNet is told {config.projection_class_embeddings_input_dim} numbers on text and "
            f"size, the second text encoder and {NUM_TIME_IDS} sizes give {told}; expected a base model and "
            "its own text encoders (a refiner takes 5 sizes)"
        )
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if lengths[0] != lengths[1]:
        raise PolicyError(
            f"{where}: the tokenizers cut at {lengths[0]} and {lengths[1]} tokens; expected one length, "
            "their states stand side by side"
        )
    if vae.config.get("latents_mean") is not None:
        raise PolicyError(
            f"{where}: vae.latents_mean is set; latents that are shifted channel by channel are not "
            "supported, expected a scaling_factor alone"
        )


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    pooled = config.projection_class_embeddings_input_dim - NUM_TIME_IDS * config.addition_time_embed_dim
    told = {"text_embeds": empty(pooled), "time_ids": empty(NUM_TIME_IDS)}
    return {**plain.denoiser_inputs(config, shape, text_tokens, empty), "added_cond_kwargs": told}
