"""Linear diffusion transformers in the SANA layout: Gemma 2 reads the text, a deep autoencoder makes 32 x 32
pixels one latent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import SanaPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers import Gemma2Model, GemmaTokenizerFast

from diffexpo.errors import ConfigError, PolicyError
from diffexpo.phases import phase
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading, Shape, read_path
from diffexpo.policies.pixart import prepared
from diffexpo.policies.sizes import latent_shape_of
from diffexpo.policies.t5 import LONGEST, read_sequence_length
from diffexpo.policies.text import check_vocabulary, count_tokens, load_tokenizer, tokenize
from diffexpo.types import Conditioning

# The start mark and the instruction's last token come first: with fewer tokens nothing of a prompt is read.
FEWEST = 3


def as_flow_match(scheduler: Mapping[str, object]) -> dict[str, object]:
    """Scheduler settings whose path is read: a DPM-Solver++ on flow levels walks the same path as the
    flow-match Euler scheduler.

    The levels are sigma' = s sigma / (1 + (s - 1) sigma) with s = `flow_shift`, x_t = (1 - sigma') x0 +
    sigma' eps, and the network predicts eps - x0 in both. They differ in the solver, which belongs to the
    sampler and not to the model.

    Args:
        scheduler: Content of `scheduler_config.json`.
    Returns:
        Settings of a FlowMatchEulerDiscreteScheduler with `shift` = `flow_shift`, if `use_flow_sigmas` and
        `prediction_type: flow_prediction` say that these are flow levels; else the settings as they are.
    Source: diffusers' DPMSolverMultistepScheduler; SANA (arXiv 2410.10629), Flow-DPM-Solver.
    """
    is_flow = bool(scheduler.get("use_flow_sigmas")) and scheduler.get("prediction_type") == "flow_prediction"
    if not is_flow:
        return dict(scheduler)
    return {
        **scheduler,
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": scheduler.get("flow_shift", 1.0),
        # This pipeline tells its scheduler no size that a shift could follow from.
        "use_dynamic_shifting": False,
    }


def pipeline_instruction() -> str:
    """What the pipeline's call puts before a prompt by default, as the model was trained: the "complex human
    instruction".

    Source: SANA (arXiv 2410.10629), complex human instruction. Taken from the installed pipeline, which draws
        with it after an export.
    """
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines or ())


@dataclass(kw_only=True, eq=False, repr=False)
class SanaPolicy(FamilyPolicy):
    """A SANA model. The denoiser is told Gemma's states (B, max_tokens, D) of the prompts in lower case, and
    the mask (B, max_tokens) of their tokens.

    Every prompt follows the pipeline's instruction; the empty text, which guidance leads away from, stands
    alone, as the pipeline's negative prompt does.
    """

    text_encoder: Gemma2Model
    tokenizer: GemmaTokenizerFast
    sequence_length: int

    @cached_property
    def instruction(self) -> str:
        """What stands before every prompt."""
        return pipeline_instruction()

    @cached_property
    def _hidden(self) -> int:
        """Tokens of the instruction that the network does not see: all but the first and the last."""
        return len(self.tokenizer.encode(self.instruction)) - 2 if self.instruction else 0

    @property
    def component_dtypes(self) -> dict[str, torch.dtype]:
        return {"text_encoder": self.text_encoder.dtype, "vae": self.vae.dtype}

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the start mark and the instruction's last one included; above `max_tokens`
        it would be cut."""
        counts = count_tokens(self.tokenizer, [self._text(prompt) for prompt in prompts])
        return [count - self._hidden_in(prompt) for count, prompt in zip(counts, prompts, strict=True)]

    def text_modules(self) -> list[nn.Module]:
        return [self.text_encoder]

    def _text(self, prompt: str) -> str:
        return self.instruction + prepared(prompt) if prompt else ""

    def _hidden_in(self, prompt: str) -> int:
        return self._hidden if prompt else 0

    def encode_prompt(self, prompt: str) -> Conditioning:
        tokens = tokenize(self.tokenizer, self._text(prompt), self.max_tokens + self._hidden_in(prompt))
        mask = tokens.attention_mask.to(self.device)
        with torch.no_grad():
            states = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        seen = [0, *range(1 - self.max_tokens, 0)]
        return Conditioning(
            {"encoder_hidden_states": states[:, seen], "encoder_attention_mask": mask[:, seen]}
        )

    @phase("encoding pictures")
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w). This autoencoder gives latents and no
        distribution."""
        pixels = images.to(self.vae.device, self.vae.dtype) * 2 - 1
        with torch.no_grad():
            latents = self.vae.encode(pixels, return_dict=False)[0]
        return latents * self.vae.config.scaling_factor

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        network = self.weights.network
        velocity = network(
            self.on_device(x_t),
            encoder_hidden_states=self.on_device(conditioning.tensors["encoder_hidden_states"]),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"].to(self.device),
            # As the scheduler gives it: float32 before the network's own unit.
            timestep=self.path.timestep(t).float().to(self.device) * network.config.timestep_scale,
            return_dict=False,
        )[0]
        # Contiguous: with patches of one latent the output is a view in another order.
        return velocity.to(x_t.dtype).contiguous()


def load(ask: Loading) -> SanaPolicy:
    """Load a SanaPipeline folder by components."""
    length = read_sequence_length(ask.folder, ask.model, ask.card.text_tokens)
    if length < FEWEST:
        raise ConfigError(
            f"model.max_sequence_length={length}: the start mark and the end of the pipeline's instruction "
            f"take two tokens, so nothing of a prompt would be read; expected {FEWEST} to {LONGEST}"
        )
    path, files = read_path(ask.folder, "flow", as_flow_match), ask.files()
    tokenizer = load_tokenizer(ask.folder, "tokenizer", "GemmaTokenizerFast", needs_file="tokenizer.json")
    # As the pipeline has it: Gemma's own padding stands before the text.
    tokenizer.padding_side = "right"
    encoder = ask.network("text_encoder", text_dtype(ask.dtype))
    transformer, vae = ask.denoiser(), ask.autoencoder()
    config = transformer.config
    if config.guidance_embeds:
        raise PolicyError(
            f"{ask.where}: transformer.guidance_embeds=true, so the network is also fed a guidance scale "
            "(a distilled model); expected a transformer that takes latents, time and text, as in a "
            f"{ask.card.pipeline}"
        )
    if encoder.config.hidden_size != config.caption_channels:
        raise PolicyError(
            f"{ask.where}: the text encoder gives states of {encoder.config.hidden_size}, the transformer "
            f"takes {config.caption_channels}; the components belong to different models"
        )
    check_vocabulary(ask.folder, tokenizer, encoder, ("the tokenizer", "the text encoder"))
    return ask.policy(
        SanaPolicy,
        files,
        transformer,
        path=path,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        sequence_length=length,
        latent_shape=latent_shape_of(
            config, vae, ask.where, resolution=ask.model.resolution, patch=config.patch_size
        ),
    )


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of Gemma beside a denoiser of `dtype`: its values go beyond float16's range, for which
    bfloat16 stands in.

    Source: the example of diffusers' SanaPipeline, which moves the text encoder to bfloat16.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "hidden_states": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.caption_channels),
        "encoder_attention_mask": empty(text_tokens),
    }
