"""Named versions of the trainable weights on one base: adapters (LoRA) or module copies (full fine-tuning).

Both satisfy `diffexpo.types.WeightSets` and add `network` (the module that runs now), `base_module` and
`fingerprint(name)`. "current" is trained, "base" never changes, "reference" is the base until something is
copied or loaded onto it.
"""

from __future__ import annotations

import importlib.util

import torch
from diffusers import ModelMixin

from diffexpo.config.families import Family
from diffexpo.config.families.card import LORA_TARGETS
from diffexpo.config.schema import ModelConfig, TuningConfig
from diffexpo.errors import ConfigError, MissingError
from diffexpo.policies.adapters import LoraWeightSets
from diffexpo.policies.copies import CopyWeightSets
from diffexpo.policies.loading import DTYPES
from diffexpo.policies.states import fingerprint_state

__all__ = ["CopyWeightSets", "LoraWeightSets", "apply_speed_settings", "fingerprint_state", "make_weights"]
# Every version of the weights, with and without gradients and for each width of block, is a graph of its own;
# beyond torch's limit of 8 it would fall back to the uncompiled network without a word.
MAX_GRAPHS = 64


def make_weights(
    network: ModelMixin, tuning: TuningConfig, seed: int, card: Family | None = None
) -> LoraWeightSets | CopyWeightSets:
    """Adapters, whose factors the run's seed keys, or copies on a denoiser, as the tuning kind says.

    The family's card has the targets of adapters where the settings name none, and the parameters that cannot
    get a gradient.
    """
    if tuning.kind == "lora":
        targets = tuning.lora.target_modules or (card.lora_targets if card else LORA_TARGETS)
        return LoraWeightSets(network, tuning.lora, seed, targets)
    return CopyWeightSets(
        network,
        card.inert_parameters(network.config, dict(network.named_parameters())) if card else (),
        reference_dtype=DTYPES[tuning.reference_dtype],
        parks_copies=tuning.reference_device == "cpu",
    )


def apply_speed_settings(
    model: ModelConfig, weights: LoraWeightSets | CopyWeightSets, device: torch.device
) -> None:
    """Memory layout and compilation of all versions, as the configuration says.

    Raises:
        ConfigError: channels-last for a network without convolutions in its blocks; compilation on the CPU,
            or of a network that repeats no block.
        MissingError: no compiler.
    """
    if model.channels_last:
        if not hasattr(weights.network, "down_blocks"):
            raise ConfigError(
                f"model.channels_last=true: {type(weights.network).__name__} is no UNet and gains nothing; "
                "expected false"
            )
        weights.prepare_networks(lambda network: network.to(memory_format=torch.channels_last))
    if model.compile == "blocks":
        check_compiler(device)
        compile_blocks(weights)


def compile_blocks(weights: LoraWeightSets | CopyWeightSets, backend: str = "inductor") -> None:
    """Compile the blocks that the denoiser repeats, of every version; the backend "eager" traces without
    generating code."""
    if not getattr(weights.network, "_repeated_blocks", None):
        raise ConfigError(
            f"model.compile=blocks: {type(weights.network).__name__} names no repeated blocks; expected off"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    weights.prepare_networks(lambda network: network.compile_repeated_blocks(backend=backend))


def check_compiler(device: torch.device) -> None:
    """Refuse to compile without Triton, and on the CPU: a version with adapters and one without are two
    graphs, which round differently; but there the margin at the start is checked to be exactly 0, and equal
    runs to be equal bit for bit."""
    if device.type == "cpu":
        raise ConfigError(
            "model.compile=blocks on the CPU: compiled versions of equal weights differ by rounding, and "
            "runs on the CPU are exact; expected off, or an accelerator as model.device"
        )
    if importlib.util.find_spec("triton") is None:
        raise MissingError(
            f"model.compile=blocks: needs Triton on device {device}, which was not found; install it, or set "
            "model.compile=off"
        )
