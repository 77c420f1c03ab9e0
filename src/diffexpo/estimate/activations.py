"""Activations of a network without weights: it runs on the meta device, where tensors have a shape and no
memory, and what is alive is added up.

    held = bytes alive when the forward pass has ended (what the backward pass needs)
    peak = most bytes alive at once, forward and backward

Counted are all tensors but weights, gradients and inputs. Attention counts as on accelerators and the CPU,
whose kernels keep no matrix of probabilities (queries, keys, values, output and one number a row). Under
autocast the precisions of CUDA's lists hold: matrix products in half precision, with a cast copy of each
weight, normalisation in float32. Not counted: workspace inside kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffexpo.policies.blueprint import Blueprint, denoiser_inputs

PRODUCTS = (functional.linear, functional.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm)
LOWER = (*PRODUCTS, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)
RAISED = (functional.group_norm, functional.layer_norm, functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Activations:
    """Bytes besides weights, gradients and inputs, see the head of this file."""

    held: int
    peak: int


def measure_denoiser(
    blueprint: Blueprint,
    *,
    has_gradient: bool,
    rows: int = 1,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
) -> Activations:
    """Activations of the denoiser, in proportion to the rows but for autocast's copies of weights; parameters
    that ask for a gradient get one.

    Args:
        rows: Latents that pass at once.
        has_gradient: Forward and backward, or forward alone.
        autocast: Precision of autocast; None is off.
        gradient_checkpointing: Blocks are computed again in the backward pass.
    """
    network = blueprint.denoiser
    mode = _Substitutes(autocast)
    if gradient_checkpointing and has_gradient:
        network.enable_gradient_checkpointing(mode.checkpointed)
    try:
        return _measure(network, denoiser_inputs(blueprint, rows), mode, has_gradient)
    finally:
        network.disable_gradient_checkpointing()


def measure_decoder(blueprint: Blueprint, *, is_tiled: bool = False) -> Activations:
    """Activations of decoding one latent to an image, at once or in tiles."""
    vae = blueprint.networks["vae"]
    (vae.enable_tiling if is_tiled else vae.disable_tiling)()
    latents = torch.empty(1, vae.config.latent_channels, *blueprint.latent_shape[1:], device="meta")
    return _measure(vae, {"z": latents}, _Substitutes(None), False, vae.decode)


def forward_flops(blueprint: Blueprint) -> int:
    """Floating-point operations of the denoiser's forward on one row, a multiplication and an addition
    counting two; 0.80e12 for SD 1.5 at 512 pixels."""
    mode = _Substitutes(None)
    with mode, FlopCounterMode(display=False) as counter, torch.no_grad():
        blueprint.denoiser(**denoiser_inputs(blueprint, 1), return_dict=False)
    return counter.get_total_flops() + mode.attention_flops


def _measure(
    network: nn.Module,
    inputs: Mapping[str, Any],
    mode: _Substitutes,
    has_gradient: bool,
    run: Callable[..., Any] | None = None,
) -> Activations:
    """Activations of a network, or of a method of it."""
    ledger = Ledger()
    for tensor in (*network.parameters(), *network.buffers(), *tree_leaves(inputs)):
        if isinstance(tensor, Tensor):
            ledger.leave_out(tensor)
            if has_gradient and tensor.requires_grad:
                tensor.grad = torch.empty_like(tensor)
                ledger.leave_out(tensor.grad)
    with ledger, torch.set_grad_enabled(has_gradient):
        with mode:
            output = (run or network)(**inputs, return_dict=False)[0]
        held = ledger.live
        if has_gradient:
            output.float().square().mean().backward()
    network.zero_grad()
    return Activations(held, ledger.peak)


class Ledger(TorchDispatchMode):
    """Adds up the storages that operations make while they are alive, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count this tensor's storage."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self.live += size
            self._known[key] = weakref.ref(storage, partial(self._forget, key, size))

    def _forget(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output and the log of the sum of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


class _Substitutes(TorchFunctionMode):
    """Fused attention, and autocast's choice of precision, which the meta device does not have."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.attention_flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key, value = (self._to(given[name], self.autocast) for name in names)
            # Scores and their product with the values.
            self.attention_flops += 2 * query.numel() * key.shape[-2] + 2 * query.numel() * value.shape[-2]
            return _FusedAttention.apply(query, key, value)
        dtype = self.autocast if func in LOWER else torch.float32 if func in RAISED else None
        if self.autocast is not None and dtype is not None:
            args = tuple(self._to(value, dtype) for value in args)
            kwargs = {name: self._to(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """A block that is computed again in the backward pass, where this mode is off and has to be entered
        again."""

        def run(*values: Any) -> Any:
            with nullcontext() if torch.overrides._is_torch_function_mode_enabled() else self:
                return block(*values)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _to(self, value: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.to(dtype)
