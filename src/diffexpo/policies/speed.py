"""Settings that change speed and memory layout of a loaded denoiser, and its results by rounding at most."""

from __future__ import annotations

import importlib.util

import torch

from diffexpo.config.schema import ModelConfig
from diffexpo.errors import ConfigError, MissingError
from diffexpo.policies.weights import CopyWeightSets, LoraWeightSets

# Every version of the weights, with and without gradients and for each width of block, is a graph of its own;
# beyond torch's limit of 8 it would fall back to the uncompiled network without a word.
MAX_GRAPHS = 64


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
