"""UNet latent diffusion in the Stable Diffusion 1.x and 2.x layout (eps, v or x0 prediction)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffexpo.errors import PolicyError
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Shape, read_path
from diffexpo.policies.sizes import latent_shape_of
from diffexpo.policies.text import count_tokens, load_tokenizer, tokenize
from diffexpo.types import Conditioning

# Settings of a UNet that mean one more input, and what it is.
FURTHER_INPUTS = {
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "time_cond_proj_dim": "a guidance scale (a distilled model)",
    "encoder_hid_dim_type": "an image",
}
EARLY_VERSIONS = tuple(f"0.{minor}." for minor in range(9))


@dataclass(kw_only=True, eq=False, repr=False)
class UNetPolicy(FamilyPolicy):
    """A Stable Diffusion 1.x or 2.x model. The denoiser is told the last hidden states (B, max_tokens, D) of
    the text encoder."""

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @property
    def max_tokens(self) -> int:
        """Longest text, marks included, that is read whole."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt, start and end included; above `max_tokens` the text encoder would cut it."""
        return count_tokens(self.tokenizer, prompts)

    def text_modules(self) -> list[nn.Module]:
        return [self.text_encoder]

    def encode_prompt(self, prompt: str) -> Conditioning:
        tokens = tokenize(self.tokenizer, prompt)
        mask = None
        if self.text_encoder.config.to_dict().get("use_attention_mask"):
            mask = tokens.attention_mask.to(self.device)
        with torch.no_grad():
            states = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        return Conditioning({"encoder_hidden_states": states})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The UNet's own output for x_t (B,C,h,w) at t (B,), in x_t's type."""
        prediction = self.weights.network(
            self.on_device(x_t),
            self.path.timestep(t).to(self.device),
            encoder_hidden_states=self.on_device(conditioning.tensors["encoder_hidden_states"]),
            return_dict=False,
        )[0]
        # Contiguous: with channels-last weights the network's output is not.
        return prediction.to(x_t.dtype).contiguous()


def load(ask: Loading) -> UNetPolicy:
    """Load a StableDiffusionPipeline folder by components (safety checker and feature extractor are left
    out)."""
    path = read_path(ask.folder, "vp", as_the_pipeline_reads)
    files = ask.files()
    tokenizer = load_tokenizer(ask.folder, "tokenizer")
    text_encoder, unet, vae = ask.network("text_encoder"), ask.denoiser(), ask.autoencoder()
    config = unet.config
    if config.cross_attention_dim != text_encoder.config.hidden_size:
        raise PolicyError(
            f"{ask.where}: unet.cross_attention_dim={config.cross_attention_dim} but the text encoder "
            f"gives {text_encoder.config.hidden_size}; the components belong to different models"
        )
    if config.addition_embed_type is not None:
        raise PolicyError(
            f"{ask.where}: unet.addition_embed_type={config.addition_embed_type!r}; a {ask.card.pipeline} "
            "tells its network time and text only, expected null (Stable Diffusion XL is a "
            "StableDiffusionXLPipeline)"
        )
    size = config.get("sample_size")
    # diffusers corrects the files of its first releases, which name a size no checkpoint was trained at.
    is_early = str(config.get("_diffusers_version", "1")).startswith(EARLY_VERSIONS)
    if is_early and isinstance(size, int) and size < 64:
        config = FrozenDict({**config, "sample_size": 64})
    return ask.policy(
        UNetPolicy,
        files,
        unet,
        path=path,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        latent_shape=unet_shape_of(config, vae, ask),
    )


def unet_shape_of(config: FrozenDict, vae: AutoencoderKL, ask: Loading) -> Shape:
    """(C, h, w) of a UNet's latents, after checking that nothing but latents, time and text is fed to it.

    Raises:
        PolicyError: a UNet that is also fed a class, a guidance scale or an image.
        ConfigError: the resolution does not divide.
    """
    for key, what in FURTHER_INPUTS.items():
        if config.get(key) is not None:
            raise PolicyError(
                f"{ask.where}: unet.{key}={config[key]!r}, so the network is also fed {what}; expected a "
                "text-to-image UNet that takes latents, time and text"
            )
    return latent_shape_of(config, vae, ask.where, resolution=ask.model.resolution)


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


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "sample": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.cross_attention_dim),
    }
