"""What is known of a model family without loading it: the card that loading, export, estimates and citations
ask. Imports without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

# The attention's projections, where adapters go unless the settings or the family say otherwise.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Checkpoint:
    """A published base model of a family.

    Args:
        name: What `--architecture` calls it; its settings stand under this name in
            `estimate/architectures.json`.
        pattern: Recognises its hub id, its folder's name and those of its fine-tuned versions (lower case).
        parameters: The denoiser's published number of parameters.
        licence: The hub's identifier, or the name of a licence of its own. A fine-tuned model mostly has the
            licence of the model that it began as.
    """

    name: str
    pattern: str
    parameters: int
    licence: str


@dataclass(frozen=True)
class Family:
    """The card of a model family. Its code is the module of the same name in `diffexpo.policies`.

    Args:
        name: Name of the modules of card and code.
        pipeline: Class of diffusers that `model_index.json` names.
        pattern: Recognises the family in a model's name (lower case), for citations.
        papers: Keys of `papers.WORKS`.
        denoiser: (component, class) of the network that is trained.
        text_encoders: Component -> class, in the order of the pipeline.
        checkpoints: Published models whose sizes are known, narrower patterns first.
        export_names: (`modelspec.architecture`, base version of kohya's tools) in an exported LoRA's header.
        export_names_by_text_width: The same where the denoiser's `cross_attention_dim` tells another version.
        papers_by_name: Further papers of models whose name has the pattern.
        autoencoder: Class of the autoencoder.
        optional: Components that a run may leave out (`model.drop_t5`).
        text_tokens: Tokens of T5, or of what stands in its place, that the pipeline reads by default; 0 for
            families whose text length cannot be set.
        has_clip_states: The denoiser also sees the states of the first text encoder.
        text_reader: Model that reads the text whose length can be set.
        patch: Latents that the denoiser takes together in each direction, where its file does not say so.
        lora_targets: Endings of the names of modules that get adapters.
        inert: Patterns of parameter names that no gradient can reach or that change nothing; `{last}` is
            the number of the last block.
        inert_unless: Setting of the denoiser that makes the inert parameters matter.
        default_guidance: The pipeline's own scale of classifier-free guidance, where another is worth a
            warning.
        is_fed_guidance: What the pipeline calls guidance is a number that the network is fed.
        call: Arguments of the pipeline's call that keep it from changing text or size.
        call_needs_size: The pipeline's call draws its own size unless it is told the model's.
        has_kohya_file: Exported LoRAs are also written with the names of kohya's tools (`lora_unet_*`).
        input_convolution: Path of the convolution that reads latents, which an improvement model widens;
            empty: there is no improvement model of this family.
    """

    name: str
    pipeline: str
    pattern: str
    papers: tuple[str, ...]
    denoiser: tuple[str, str]
    text_encoders: Mapping[str, str]
    checkpoints: tuple[Checkpoint, ...]
    export_names: tuple[str, str]
    export_names_by_text_width: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    papers_by_name: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    autoencoder: str = "AutoencoderKL"
    optional: tuple[str, ...] = ()
    text_tokens: int = 0
    has_clip_states: bool = False
    text_reader: str = "T5"
    patch: int | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    inert: tuple[str, ...] = ()
    inert_unless: str = ""
    default_guidance: float | None = None
    is_fed_guidance: bool = False
    call: Mapping[str, object] = field(default_factory=dict)
    call_needs_size: bool = False
    has_kohya_file: bool = False
    input_convolution: str = ""

    @property
    def parts(self) -> dict[str, str]:
        """Component -> class of every network: text encoders, denoiser, autoencoder."""
        return {**self.text_encoders, self.denoiser[0]: self.denoiser[1], "vae": self.autoencoder}

    def inert_parameters(self, config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
        """Names of a denoiser's inert parameters, given its configuration and the names of all."""
        if self.inert_unless and config.get(self.inert_unless) is not None:
            return ()
        patterns = [pattern.format(last=int(config.get("num_layers") or 0) - 1) for pattern in self.inert]
        return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))

    def works(self, path: str = "") -> tuple[str, ...]:
        """Keys of the papers of a model of this family, whose name may tell more of them."""
        further = [keys for pattern, keys in self.papers_by_name.items() if re.search(pattern, path.lower())]
        return (*self.papers, *(key for keys in further for key in keys))
