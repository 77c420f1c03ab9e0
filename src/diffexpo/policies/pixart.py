"""Diffusion transformers in the PixArt-Sigma layout: T5 states through cross-attention, eps prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import AutoencoderKL, PixArtTransformer2DModel
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from diffexpo.errors import PolicyError
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Shape, read_path
from diffexpo.policies.t5 import T5Text, load_t5, read_sequence_length
from diffexpo.types import Conditioning

# What PixArt-alpha feeds beside the time, and Sigma does not.
NO_SIZE = {"resolution": None, "aspect_ratio": None}


@dataclass(kw_only=True, eq=False, repr=False)
class PixArtPolicy(FamilyPolicy):
    """A PixArt-Sigma model. The denoiser is told T5's states (B, max_tokens, D) of the prompts in lower case,
    and the mask (B, max_tokens) of their tokens."""

    t5: T5Text

    @property
    def sequence_length(self) -> int:
        return self.t5.length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the end mark included; above `max_tokens` the text would be cut."""
        return self.t5.count_tokens([prepared(prompt) for prompt in prompts])

    def text_modules(self) -> list[nn.Module]:
        return [self.t5.encoder]

    def encode_prompt(self, prompt: str) -> Conditioning:
        states, mask = self.t5.encode(prepared(prompt), is_masked=True)
        return Conditioning({"encoder_hidden_states": states, "encoder_attention_mask": mask})

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's own output for x_t (B,C,h,w) at t (B,), in x_t's type, without the channels of a
        learned variance."""
        prediction = self.weights.network(
            self.on_device(x_t),
            encoder_hidden_states=self.on_device(conditioning.tensors["encoder_hidden_states"]),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"].to(self.device),
            timestep=self.path.timestep(t).to(self.device),
            added_cond_kwargs=NO_SIZE,
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]].to(x_t.dtype).contiguous()


def prepared(prompt: str) -> str:
    """The text that the pipeline hands to its tokenizer (with `clean_caption=False`): lower case, no blanks
    around it."""
    return prompt.lower().strip()


def load(ask: Loading) -> PixArtPolicy:
    """Load a PixArtSigmaPipeline folder by components."""
    path, files = read_path(ask.folder, "vp"), ask.files()
    length = read_sequence_length(ask.folder, ask.model, ask.card.text_tokens)
    t5 = load_t5(ask, ("text_encoder", "tokenizer"), length)
    transformer, vae = ask.denoiser(), ask.autoencoder()
    _check_fit(ask.where, transformer, vae, t5)
    size = ask.latent_size(transformer.config.sample_size, transformer, vae)
    return ask.policy(
        PixArtPolicy,
        files,
        transformer,
        path=path,
        vae=vae,
        t5=t5,
        latent_shape=(transformer.config.in_channels, *size),
    )


def _check_fit(where: str, transformer: PixArtTransformer2DModel, vae: AutoencoderKL, t5: T5Text) -> None:
    """Raise PolicyError unless the transformer is Sigma's and takes what the others give."""
    config, channels = transformer.config, vae.config.latent_channels
    if transformer.use_additional_conditions:
        raise PolicyError(
            f"{where}: the transformer is also fed the picture's size (use_additional_conditions), as "
            "PixArt-alpha's at 1024 pixels; expected a PixArt-Sigma transformer"
        )
    if config.in_channels != channels or transformer.out_channels not in (channels, 2 * channels):
        raise PolicyError(
            f"{where}: the transformer takes {config.in_channels} and gives {transformer.out_channels} "
            f"channels, the autoencoder has {channels}; expected the same, or twice as many given (a learned "
            "variance, which is left out)"
        )
    if t5.encoder.config.d_model != config.caption_channels:
        raise PolicyError(
            f"{where}: the text encoder gives states of {t5.encoder.config.d_model}, the transformer takes "
            f"{config.caption_channels}; the components belong to different models"
        )


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "hidden_states": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.caption_channels),
        "encoder_attention_mask": empty(text_tokens),
        "added_cond_kwargs": NO_SIZE,
    }
