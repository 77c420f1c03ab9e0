"""Versions of the trainable weights as whole copies of the network, for full fine-tuning; frozen copies can
take less of the device's memory, with the same results bit for bit.

Under autocast the weights of linear and convolution layers are cast to half precision whenever they run. A
copy that only runs there may hold exactly those tensors in half precision: casting them once or each time
rounds alike. All others (normalisation, embeddings, free parameters) stay as they are, because autocast
leaves them alone. And a copy that seldom runs may lie in main memory and be moved in for as long as it does.
"""

from __future__ import annotations

import copy as copies
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from diffexpo.errors import PolicyError
from diffexpo.policies.states import BASE, CURRENT, REFERENCE, Versions

# Exact classes: a subclass may read its weights in another way than by the operations that autocast casts
# for.
CAST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CopyWeightSets(Versions):
    """Versions as whole copies of the network, for full fine-tuning.

    "base" is a frozen copy made at once (everything else may change "current"). Frozen versions never change
    in place, so copying one frozen version to another name shares the module; a copy is made only when values
    differ.

    Args:
        network: The denoiser; every parameter becomes trainable except the inert ones.
        inert: Name prefixes of parameters that no gradient can reach.
        reference_dtype: Of the tensors of "reference" that autocast casts. In half precision that version
            runs under autocast of the same type only, where it predicts the same bits as in float32; it
            cannot be copied from, and the base lies in main memory while it does not run.
        parks_copies: Versions other than "current" lie in main memory and are moved to the device for as long
            as they run.
    """

    kind = "full"

    def __init__(
        self,
        network: nn.Module,
        inert: tuple[str, ...] = (),
        *,
        reference_dtype: torch.dtype = torch.float32,
        parks_copies: bool = False,
    ) -> None:
        network.eval().requires_grad_(False)
        self.base_module = base = copies.deepcopy(network)
        self._inert = inert
        self._reference_dtype, self._half = reference_dtype, str(reference_dtype).removeprefix("torch.")
        self._parks_copies = parks_copies
        self._device = next(network.parameters()).device
        self._lowered: nn.Module | None = None
        self._preparations: list[Callable[[ModelMixin], object]] = []
        for parameter in self._parameters(network).values():
            parameter.requires_grad_(True)
        self._versions: dict[str, nn.Module] = {BASE: base, REFERENCE: base, CURRENT: network}
        self._settle(base)

    @property
    def network(self) -> ModelMixin:
        """The module that runs now."""
        return self._versions[self._active]

    @contextmanager
    def use(self, name: str, *, merged: bool = False) -> Iterator[None]:
        """Inside the block the network is that version; the previous one comes back afterwards. `merged`
        changes nothing.

        Raises:
            PolicyError: no such version; a reference in half precision elsewhere than under autocast of its
                type.
        """
        name = self._stand_in or name
        module = self._module(name)
        device, dtype = self._device.type, self._reference_dtype
        if module is self._lowered and not (
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype
        ):
            raise PolicyError(
                f"weights 'reference': held in {self._half}, which equals float32 under autocast of "
                "that type only; run it there, or set tuning.reference_dtype=float32"
            )
        previous, self._active = self._active, name
        try:
            must_move = self._is_parked(module) and not self._is_moved(module)
            with moved_to(module, self._device) if must_move else nullcontext():
                yield
        finally:
            self._active = previous

    def copy(self, source: str, target: str) -> None:
        """Make or overwrite `target` with the values of `source`, exactly."""
        module = self._module(source)
        self._refuse_change(target)
        if source == target:
            return
        if module is self._lowered:
            raise PolicyError(
                f"weights {source!r}: held in {self._half}, so its exact values are not here; copy "
                "the version it was made from"
            )
        if CURRENT in (source, target):
            self.load(target, self._parameters(module))
        else:
            self._versions[target] = module

    def _tensors(self, name: str) -> Mapping[str, Tensor]:
        return self._parameters(self._module(name))

    def _writable(self, name: str) -> nn.Module:
        module = self._versions.get(name)
        shared = sum(other is module for other in self._versions.values()) > 1
        if module is None or shared:
            # From the pristine base, not from "current": a training library may have wrapped the latter's
            # forward.
            module = self._made_from(self.base_module, is_lowered=self._is_lowered(name))
            self._versions[name] = module
        if self._is_parked(module) and self._is_moved(module):
            raise PolicyError(
                f"weights {name!r}: runs, and what is written to it meanwhile would be lost; change it after "
                "the block"
            )
        return module

    def prepare_networks(self, prepare: Callable[[ModelMixin], object]) -> None:
        """Apply a change of layout or execution to every version, those made later included."""
        for module in {id(module): module for module in self._versions.values()}.values():
            prepare(module)
        self._preparations.append(prepare)

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: value for name, value in module.named_parameters() if not name.startswith(self._inert)}

    def _module(self, name: str) -> nn.Module:
        module = self._known(name)
        if self._is_lowered(name) and module is not self._lowered:
            # What was copied here is shared with a version in float32 until the reference is asked for.
            module = self._versions[name] = self._made_from(module, is_lowered=True)
        return module

    def _is_lowered(self, name: str) -> bool:
        return name == REFERENCE and self._reference_dtype != torch.float32

    def _made_from(self, module: nn.Module, *, is_lowered: bool) -> nn.Module:
        """A new copy, prepared like all others, where it has to lie."""
        if is_lowered:
            self._lowered = None  # the memory of the one before is free first
        made = copies.deepcopy(module)
        for prepare in self._preparations:
            prepare(made)
        if is_lowered:
            lower_precision(made, self._reference_dtype)
            self._lowered = made
        self._settle(made)
        return made

    def _is_parked(self, module: nn.Module) -> bool:
        """Whether a frozen module lies in main memory while it does not run."""
        is_spare = module is self.base_module and self._reference_dtype != torch.float32
        is_apart = self._device.type != "cpu" and module is not self._versions[CURRENT]
        return is_apart and (self._parks_copies or is_spare)

    def _settle(self, module: nn.Module) -> None:
        module.to("cpu" if self._is_parked(module) else self._device)

    def _is_moved(self, module: nn.Module) -> bool:
        return next(module.parameters()).device == self._device


def cast_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that autocast casts to its own type each time they are used."""
    for module in network.modules():
        if type(module) in CAST_LAYERS:
            yield from module.parameters(recurse=False)


def lower_precision(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold in `dtype` what autocast of that type would cast anyway, in place; the network then runs under
    that autocast only."""
    for parameter in cast_parameters(network):
        parameter.data = parameter.data.to(dtype)


def lowered_bytes(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of parameters and buffers after `lower_precision`."""
    lowered = {id(parameter) for parameter in cast_parameters(network)}
    return sum(
        tensor.numel() * (dtype.itemsize if id(tensor) in lowered else tensor.element_size())
        for tensor in tensors_of(network)
    )


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers, each once."""
    yield from network.parameters()
    yield from network.buffers()


@contextmanager
def moved_to(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the network's tensors are on the device; afterwards those in main memory are in their
    place again.

    Nothing is copied back, so what is written inside the block is lost. For CUDA they are put into
    page-locked memory, from which copies are faster, the first time.
    """
    kept = []
    for tensor in tensors_of(network):
        if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()
        kept.append((tensor, tensor.data))
    try:
        for tensor, values in kept:
            tensor.data = values.to(device, non_blocking=True)
        yield
    finally:
        for tensor, values in kept:
            tensor.data = values
