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
from torch import Tensor

from diffexpo.errors import ConfigError
from diffexpo.policies.family import Empty, FamilyPolicy, Inputs, Loading
from diffexpo.policies.pixart import prepared
from diffexpo.policies.sizes import Shape
from diffexpo.policies.text import LONGEST, encode_text

# The start mark and the instruction's last token come first: with fewer tokens nothing of a prompt is read.
FEWEST = 3


def as_flow_match(scheduler: Mapping[str, object]) -> dict[str, object]:
    """Scheduler settings whose path is read: a DPM-Solver++ on flow levels walks the same path as the
    flow-match Euler scheduler.

    The levels are sigma' = s sigma / (1 + (s - 1) sigma) with s = `flow_shift`, x_t = (1 - sigma') x0 +
    sigma' eps, and the network predicts eps - x0 in both. They differ in the solver, which belongs to the
    sampler and not to the model.

    Returns:
        Settings of a FlowMatchEulerDiscreteScheduler with `shift` = `flow_shift`, if `use_flow_sigmas` and
        `prediction_type: flow_prediction` say that these are flow levels; else the settings as they are.
    Source: diffusers' DPMSolverMultistepScheduler; SANA (arXiv 2410.10629), Flow-DPM-Solver.
    """
    if not scheduler.get("use_flow_sigmas") or scheduler.get("prediction_type") != "flow_prediction":
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

    keeps_dtypes = True

    @cached_property
    def instruction(self) -> str:
        """What stands before every prompt."""
        return pipeline_instruction()

    @cached_property
    def _hidden(self) -> int:
        """Tokens of the instruction that the network does not see: all but the first and the last."""
        return len(self.tokenizers[0].encode(self.instruction)) - 2 if self.instruction else 0

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the start mark and the instruction's last one included; above `max_tokens`
        it would be cut."""
        read = [self._read(prompt) for prompt in prompts]
        counts = super().count_tokens([text for text, _ in read])
        return [count - hidden for count, (_, hidden) in zip(counts, read, strict=True)]

    def _read(self, prompt: str) -> tuple[str, int]:
        """The text that Gemma reads, and how many tokens of it the network does not see."""
        return (self.instruction + prepared(prompt), self._hidden) if prompt else ("", 0)

    def encode_prompt(self, prompt: str) -> Mapping[str, Tensor]:
        text, hidden = self._read(prompt)
        length = self.max_tokens + hidden
        output, mask = encode_text(self.tokenizers[0], self.text_encoder, text, length, is_masked=True)
        seen = [0, *range(1 - self.max_tokens, 0)]
        return {"encoder_hidden_states": output[0][:, seen], "encoder_attention_mask": mask[:, seen]}

    def denoise(self, latents: Tensor, timestep: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        network = self.weights.network
        # As the scheduler gives it: float32 before the network's own unit.
        time = timestep.float() * network.config.timestep_scale
        # With patches of one latent the output is a view in another order.
        return network(latents, timestep=time, return_dict=False, **told)[0].contiguous()


def load(ask: Loading) -> SanaPolicy:
    """Load a SanaPipeline folder by components."""
    if ask.sequence_length < FEWEST:
        raise ConfigError(
            f"model.max_sequence_length={ask.sequence_length}: the start mark and the end of the pipeline's "
            "instruction take two tokens, so nothing of a prompt would be read; expected "
            f"{FEWEST} to {LONGEST}"
        )
    # Gemma's values go beyond float16's range; the example of diffusers' SanaPipeline has it in bfloat16.
    text_dtype = torch.bfloat16 if ask.dtype == torch.float16 else ask.dtype
    path, parts = ask.path("flow", as_flow_match), ask.parts(text_dtype)
    # As the pipeline has it: Gemma's own padding stands before the text.
    parts.tokenizers[0].padding_side = "right"
    config = parts.denoiser.config
    if config.guidance_embeds:
        raise ask.error(
            "transformer.guidance_embeds=true, so the network is also fed a guidance scale (a distilled "
            f"model); expected a transformer that takes latents, time and text, as in a {ask.card.pipeline}"
        )
    ask.check_states(parts.text_encoders[0].config.hidden_size, config.caption_channels)
    ask.check_channels(parts)
    return ask.policy(SanaPolicy, parts, path=path, latent_shape=ask.latent_shape(parts))


def denoiser_inputs(config: FrozenDict, shape: Shape, text_tokens: int, empty: Empty) -> Inputs:
    return {
        "hidden_states": empty(*shape),
        "encoder_hidden_states": empty(text_tokens, config.caption_channels),
        "encoder_attention_mask": empty(text_tokens),
    }
