"""UNet latent diffusion in the Stable Diffusion 1.x and 2.x layout (eps, v or x0 prediction)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Parts
from diffexpo.policies.sizes import Shape
from diffexpo.policies.text import encode_text

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

    @property
    def max_tokens(self) -> int:
        """Longest text, marks included, that is read whole."""
        return min(
            *(tokenizer.model_max_length for tokenizer in self.tokenizers),
            *(encoder.config.max_position_embeddings for encoder in self.text_encoders),
        )

    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        encoder = self.text_encoder
        is_masked = bool(encoder.config.to_dict().get("use_attention_mask"))
        output, _ = encode_text(self.tokenizers[0], encoder, prompt, is_masked=is_masked)
        return {"encoder_hidden_states": output[0]}

    def further_inputs(self, latents: Tensor, told: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the UNet besides latents, time and states."""
        return {}

    def denoise(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        states, further = told["encoder_hidden_states"], self.further_inputs(latents, told)
        network = self.weights.network
        output = network(latents, timestep, encoder_hidden_states=states, return_dict=False, **further)[0]
        # With channels-last weights the network's output is not contiguous.
        return output.contiguous()


def load(ask: Loading) -> UNetPolicy:
    """Load a StableDiffusionPipeline folder by components (safety checker and feature extractor are left
    out)."""
    path, parts = ask.path("vp", as_the_pipeline_reads), ask.parts()
    config = parts.denoiser.config
    check_unet(ask, parts)
    if config.addition_embed_type is not None:
        raise ask.error(
            f"unet.addition_embed_type={config.addition_embed_type!r}; a {ask.card.pipeline} tells its "
            "network time and text only, expected null (Stable Diffusion XL is a StableDiffusionXLPipeline)"
        )
    size = config.get("sample_size")
    # diffusers corrects the files of its first releases, which name a size no checkpoint was trained at.
    is_early = str(config.get("_diffusers_version", "1")).startswith(EARLY_VERSIONS)
    if is_early and isinstance(size, int) and size < 64:
        size = 64
    return ask.policy(UNetPolicy, parts, path=path, latent_shape=ask.latent_shape(parts, size))


def check_unet(ask: Loading, parts: Parts) -> None:
    """Raise PolicyError unless the UNet takes what the others give, and nothing but latents, time and
    text."""
    config = parts.denoiser.config
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    if config.cross_attention_dim != width:
        gives = "text encoder gives" if len(parts.text_encoders) == 1 else "text encoders give"
        raise ask.unfitting(f"unet.cross_attention_dim={config.cross_attention_dim} but the {gives} {width}")
    for key, what in FURTHER_INPUTS.items():
        if config.get(key) is not None:
            raise ask.error(
                f"unet.{key}={config[key]!r}, so the network is also fed {what}; expected a text-to-image "
                "UNet that takes latents, time and text"
            )
    ask.check_channels(parts)


def as_the_pipeline_reads(scheduler: Mapping[str, object]) -> dict[str, object]:
    """Scheduler settings as StableDiffusionPipeline changes them when it loads: offset 1, and nothing is
    clipped. Files of early checkpoints lack both fields, and the scheduler classes' own defaults are others.

    Source: the constructor of diffusers' StableDiffusionPipeline. StableDiffusionXLPipeline changes nothing.
    """
    return {**scheduler, "steps_offset": 1, "clip_sample": False}


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {"sample": empty(*shape), "encoder_hidden_states": empty(text_tokens, config.cross_attention_dim)}
