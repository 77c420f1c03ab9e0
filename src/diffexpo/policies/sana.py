"""Linear diffusion transformers in the SANA layout: Gemma 2 reads the text, a deep autoencoder makes 32 x 32
pixels one latent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizerFast

from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.diffusion.path import Path as DiffusionPath
from diffexpo.errors import ConfigError, MissingError, PolicyError
from diffexpo.policies.loading import (
    DTYPES,
    LOAD_ERRORS,
    ModelFolder,
    check_weight_files,
    choose_device,
    component_folder,
    count_tokens,
    fingerprint_files,
    load_module,
    move_modules,
    weight_files,
)
from diffexpo.policies.t5 import LONGEST, read_sequence_length
from diffexpo.policies.unet import decode_with, latent_shape_of, make_weights, read_path
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets
from diffexpo.types import Conditioning

PIPELINE = "SanaPipeline"
TOKENS = 300
# The start mark and the instruction's last token come first: with fewer tokens nothing of a prompt is read.
FEWEST = 3


def as_flow_match(scheduler: Mapping[str, object]) -> dict[str, object]:
    """Scheduler settings whose path is read: a DPM-Solver++ on flow levels walks the same path as the
    flow-match Euler scheduler.

    The levels are sigma' = s sigma / (1 + (s - 1) sigma) with s = `flow_shift`, x_t = (1 - sigma') x0 +
    sigma' eps, and the network predicts eps - x0 in both. They differ in the solver, which is the sampler's
    affair and not the model's.

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


def prepared(prompt: str) -> str:
    """The text that the pipeline puts behind the instruction: lower case, no blanks around it."""
    return prompt.lower().strip()


class SanaPolicy:
    """A SANA model that can denoise. See `diffexpo.types.Policy`.

    Every prompt stands behind the pipeline's instruction; the empty text, which guidance leads away from,
    stands alone, as the pipeline's negative prompt does.
    """

    def __init__(
        self,
        *,
        folder: ModelFolder,
        path: DiffusionPath,
        weights: LoraWeightSets | CopyWeightSets,
        vae: AutoencoderDC,
        text_encoder: Gemma2Model,
        tokenizer: GemmaTokenizerFast,
        max_tokens: int,
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
        self.max_tokens = max_tokens
        self.latent_shape = latent_shape
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.device = device
        self.instruction: str = pipeline_instruction()
        # Tokens of the instruction that the network does not see: all but the first and the last.
        self._hidden: int = len(tokenizer.encode(self.instruction)) - 2 if self.instruction else 0

    @property
    def component_dtypes(self) -> dict[str, torch.dtype]:
        """Components that are held in another precision than the denoiser where plain diffusers draws."""
        return {"text_encoder": self.text_encoder.dtype, "vae": self.vae.dtype}

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, the start mark and the instruction's last one included; above `max_tokens`
        it would be cut."""
        counts = count_tokens(self.tokenizer, [self._text(prompt) for prompt in prompts])
        return [count - self._hidden_in(prompt) for count, prompt in zip(counts, prompts, strict=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Gemma's states (B, max_tokens, D) of the prompts in lower case, and the mask (B, max_tokens) of
        their tokens.

        Each distinct text runs alone, so that its bits never depend on the texts beside it.
        """
        move_modules((self.text_encoder,), self.device)
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.concatenate([encoded[prompt] for prompt in prompts])

    def release_text_encoders(self) -> None:
        """Put the text encoder into main memory until the next text is to be encoded."""
        move_modules((self.text_encoder,), torch.device("cpu"))

    def _text(self, prompt: str) -> str:
        return self.instruction + prepared(prompt) if prompt else ""

    def _hidden_in(self, prompt: str) -> int:
        return self._hidden if prompt else 0

    def _encode(self, prompt: str) -> Conditioning:
        tokens = self.tokenizer(
            [self._text(prompt)],
            padding="max_length",
            max_length=self.max_tokens + self._hidden_in(prompt),
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.device)
        with torch.no_grad():
            states = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        seen = [0, *range(1 - self.max_tokens, 0)]
        return Conditioning(
            {"encoder_hidden_states": states[:, seen], "encoder_attention_mask": mask[:, seen]}
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to scaled latents (B,C,h,w). This autoencoder gives latents and no
        distribution."""
        with torch.no_grad():
            latents = self.vae.encode(images.to(self.vae.device, self.vae.dtype) * 2 - 1, return_dict=False)[
                0
            ]
        return latents * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        return decode_with(self.vae, latents, self.dtype)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity for x_t (B,C,h,w) at t (B,), in x_t's type."""
        network = self.weights.network
        velocity = network(
            x_t.to(self.device, self.dtype),
            encoder_hidden_states=conditioning.tensors["encoder_hidden_states"].to(self.device, self.dtype),
            encoder_attention_mask=conditioning.tensors["encoder_attention_mask"].to(self.device),
            # As the scheduler gives it: float32 before the network's own unit.
            timestep=self.path.timestep(t).float().to(self.device) * network.config.timestep_scale,
            return_dict=False,
        )[0]
        # Contiguous: with patches of one latent the output is a view in another order.
        return velocity.to(x_t.dtype).contiguous()


def load(
    folder: ModelFolder,
    model: ModelConfig,
    tuning: TuningConfig,
    *,
    seed: int,
    gradient_checkpointing: bool,
) -> SanaPolicy:
    """Load a SanaPipeline folder by components."""
    device, dtype = choose_device(model.device), DTYPES[model.dtype]
    length = _read_length(folder, model)
    path = read_path(folder, "flow", as_flow_match)
    files = [
        file
        for component in ("text_encoder", "transformer", "vae")
        for file in weight_files(component_folder(folder, component), folder.variant)
    ]
    check_weight_files(files)
    tokenizer = load_gemma_tokenizer(folder, "tokenizer")
    encoder = load_module(Gemma2Model, folder, "text_encoder", text_dtype(dtype), device)
    transformer = load_module(SanaTransformer2DModel, folder, "transformer", dtype, device)
    vae = load_module(AutoencoderDC, folder, "vae", torch.float32, device)
    _check_fit(folder, transformer, encoder, tokenizer)
    config = transformer.config
    latent_shape = latent_shape_of(
        config, vae, str(folder.path), resolution=model.resolution, patch=config.patch_size
    )
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return SanaPolicy(
        folder=folder,
        path=path,
        weights=make_weights(transformer, tuning, seed, inert_parameters(transformer)),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        max_tokens=length,
        latent_shape=latent_shape,
        fingerprint=fingerprint_files(files, folder.path),
        dtype=dtype,
        device=device,
    )


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of Gemma beside a denoiser of `dtype`: its values go beyond float16's range, for which
    bfloat16 stands in.

    Source: the example of diffusers' SanaPipeline, which moves the text encoder to bfloat16.
    """
    return torch.bfloat16 if dtype == torch.float16 else dtype


def load_gemma_tokenizer(folder: ModelFolder, component: str) -> GemmaTokenizerFast:
    """The Gemma tokenizer of a folder, padding behind the text as the pipeline has it.

    Raises:
        MissingError: component or tokenizer.json is not there. Without this check transformers would hand out
            a tokenizer of five tokens.
        PolicyError: its files cannot be read.
    """
    path = component_folder(folder, component)
    if not (path / "tokenizer.json").is_file():
        raise MissingError(
            f"{path / 'tokenizer.json'}: file is missing; the model folder is incomplete, copy or download "
            f"it again"
        )
    try:
        tokenizer = GemmaTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except LOAD_ERRORS as error:
        raise PolicyError(
            f"{path}: GemmaTokenizerFast cannot be loaded ({error}); copy or download it again"
        ) from error
    # Gemma's own padding stands before the text.
    tokenizer.padding_side = "right"
    return tokenizer


def inert_parameters(transformer: SanaTransformer2DModel) -> tuple[str, ...]:
    """Names of what changes nothing: in the attention to the text, a bias of the keys adds the same number to
    all logits of a query, which softmax drops, unless the keys are normalised after it (SANA 1.5).

    Their gradient is rounding, which AdamW would scale up to full steps. The attention over the picture is
    linear: no softmax there.
    """
    if transformer.config.qk_norm is not None:
        return ()
    names = (name for name, _ in transformer.named_parameters())
    return tuple(name for name in names if name.endswith(".attn2.to_k.bias"))


def _read_length(folder: ModelFolder, model: ModelConfig) -> int:
    """Tokens that the network sees, or ConfigError for settings that cannot act."""
    if model.drop_t5:
        raise ConfigError(
            f"model.drop_t5=true: a {folder.pipeline_class} has no T5 (Gemma 2 reads its texts); expected "
            f"false"
        )
    length = read_sequence_length(folder, model, TOKENS)
    if length < FEWEST:
        raise ConfigError(
            f"model.max_sequence_length={length}: the start mark and the end of the pipeline's instruction "
            f"take two tokens, so nothing "
            f"of a prompt would be read; expected {FEWEST} to {LONGEST}"
        )
    return length


def _check_fit(
    folder: ModelFolder,
    transformer: SanaTransformer2DModel,
    encoder: Gemma2Model,
    tokenizer: GemmaTokenizerFast,
) -> None:
    """Raise PolicyError unless the transformer takes what the others give, and nothing more."""
    config = transformer.config
    if config.guidance_embeds:
        raise PolicyError(
            f"{folder.path}: transformer.guidance_embeds=true, so the network is also fed a guidance scale "
            f"(a distilled model); "
            f"expected a transformer that takes latents, time and text, as in a {PIPELINE}"
        )
    if encoder.config.hidden_size != config.caption_channels:
        raise PolicyError(
            f"{folder.path}: the text encoder gives states of {encoder.config.hidden_size}, the transformer "
            f"takes "
            f"{config.caption_channels}; the components belong to different models"
        )
    if len(tokenizer) > encoder.config.vocab_size:
        raise PolicyError(
            f"{folder.path}: the tokenizer has {len(tokenizer)} tokens, the text encoder knows "
            f"{encoder.config.vocab_size}; the "
            "components belong to different models"
        )
