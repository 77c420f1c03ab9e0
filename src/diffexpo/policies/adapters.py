"""Versions of the trainable weights as LoRA adapters on one frozen base."""

from __future__ import annotations

import difflib
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffexpo.config.schema import LoraConfig as LoraSettings
from diffexpo.diffusion.kernels import at_least_float32
from diffexpo.errors import PolicyError
from diffexpo.policies.states import BASE, CURRENT, REFERENCE, Versions
from diffexpo.rng import torch_generator

_log = logging.getLogger("diffexpo")


class LoraWeightSets(Versions):
    """Versions as named peft adapters on one frozen base; the base itself is "all adapters off".

    No second model is held: "base" (and "reference", until something is copied onto it) runs the frozen
    network alone, and each other version costs only its low-rank factors.

    Args:
        network: The denoiser; gets adapters injected in place, its own weights are frozen.
        settings: Rank and alpha.
        seed: Run seed: the A factors of "current" are keyed by (seed, "lora", name). B starts at 0, so
            current equals base.
        targets: Endings of the names of modules that get an adapter.
    Raises:
        PolicyError: no module matches, or a matched one cannot carry an adapter.
    """

    kind = "lora"

    def __init__(
        self, network: ModelMixin, settings: LoraSettings, seed: int, targets: tuple[str, ...]
    ) -> None:
        check_targets(network, targets)
        self.network = network
        self.base_module = network
        self.rank = settings.rank
        self.alpha = settings.rank if settings.alpha is None else settings.alpha
        self.target_modules = targets
        self._seed = seed
        # The adapter of each version; None is "all adapters off".
        self._versions: dict[str, str | None] = {BASE: None, REFERENCE: None}
        network.requires_grad_(False)
        self._layers: dict[str, LoraLayer] = {}
        # Folded weights by module while they run, with all adapters off.
        self._folded: Mapping[str, Tensor] | None = None
        self._merged: list[str] = []
        # The base's own tensors of the modules that hold folded ones at the moment.
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        self._add(CURRENT)
        self.load(CURRENT, self._initial_state())

    @contextmanager
    def use(self, name: str, *, merged: bool = False) -> Iterator[None]:
        """Inside the block the network runs with that version; the previous one comes back afterwards.

        Args:
            merged: Run with W' = W + alpha / rank B A in place of W and B, A: fewer kernels, another
                rounding. W' is made in float32 and held in W's type; afterwards W itself is back, not W'
                minus the update. Meanwhile the version cannot be changed. Without an adapter nothing changes.
        Raises:
            PolicyError: no such version; a module whose update is no weight of its shape (a grouped
                convolution).
        """
        name = self._stand_in or name
        previous, adapter = (self._active, self._folded), self._known(name)
        to_fold = adapter if merged else None
        try:
            if to_fold is not None:
                self._merged.append(name)
            self._activate(name, None if to_fold is None else self._fold(to_fold))
            yield
        finally:
            if to_fold is not None:
                self._merged.remove(name)
            self._activate(*previous)

    def copy(self, source: str, target: str) -> None:
        """Make or overwrite `target` with the values of `source`, exactly.

        A version that equals the base by having no adapter is copied as such; onto "current" it is the
        initial adapter (B = 0).
        """
        adapter = self._known(source)
        self._refuse_change(target)
        if source == target:
            return
        if adapter is None and target != CURRENT:
            self._remove(target)
            self._versions[target] = None
        else:
            self.load(target, self.state(source))

    def _tensors(self, name: str) -> Mapping[str, Tensor]:
        """For the base they are those of the initial adapter, whose B is 0."""
        adapter = self._known(name)
        return self._initial_state() if adapter is None else self._parameters(adapter)

    def _writable(self, name: str) -> str | None:
        if self._versions.get(name) is None:
            self._add(name)
        return self._versions[name]

    def _refuse_change(self, name: str) -> None:
        super()._refuse_change(name)
        if name in self._merged:
            raise PolicyError(
                f"weights {name!r}: runs merged, and would go on with the values it had; change it after "
                "the block"
            )

    def _add(self, name: str) -> None:
        # Without the prefix a name could clash with a method of ModuleDict.
        adapter = f"version_{name.replace('.', '_')}"
        # peft initialises from the global generator; the values are overwritten, its state must not move.
        with torch.random.fork_rng(), warnings.catch_warnings():
            # As intended.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            try:
                inject_adapter_in_model(self.peft_config(self.alpha), self.network, adapter)
            except ValueError as error:
                raise PolicyError(f"tuning.lora.target_modules={[*self.target_modules]}: {error}") from error
        modules = self.network.named_modules()
        self._layers = {path: layer for path, layer in modules if isinstance(layer, LoraLayer)}
        for layer in self._layers.values():
            # Half-precision factors would lose their updates; peft casts the layer's input to their type.
            layer.lora_A[adapter].float()
            layer.lora_B[adapter].float()
        self._versions[name] = adapter
        self.network.eval()
        self._freeze()
        self._activate(self._active, self._folded)

    def _remove(self, name: str) -> None:
        adapter = self._versions.pop(name, None)
        if adapter is not None:
            for layer in self._layers.values():
                layer.delete_adapter(adapter)
            self.network.peft_config.pop(adapter)
            self._freeze()
            self._activate(self._active, self._folded)

    def _freeze(self) -> None:
        """Only "current" is trainable, whatever version runs: a backward through an earlier forward still
        reaches it."""
        for layer in self._layers.values():
            layer.set_adapter([], inference_mode=True)
        if CURRENT in self._versions:
            for parameter in self.trainable().values():
                parameter.requires_grad_(True)

    def _activate(self, name: str, folded: Mapping[str, Tensor] | None) -> None:
        self._put_back()
        adapter = None if folded is not None else self._versions[name]
        active = [] if adapter is None else [adapter]
        for layer in self._layers.values():
            # What `set_adapter` ends with. All of it walks through every factor of every version, and
            # versions change in each step.
            layer._active_adapter = active
        self._active, self._folded = name, folded
        if folded is not None:
            weights = [self._layers[path].get_base_layer().weight for path in folded]
            # Complete before the first tensor moves, so that an interruption in between can be undone.
            self._originals = [(weight, weight.data) for weight in weights]
            for weight, value in zip(weights, folded.values(), strict=True):
                weight.data = value

    def _fold(self, adapter: str) -> dict[str, Tensor]:
        """The weight of every adapted module with an adapter's update in it."""
        self._put_back()
        folded, device = {}, next(self.network.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for path, layer in self._layers.items():
                _refuse_unfoldable(path, layer.get_base_layer())
                weight = layer.get_base_layer().weight
                factors = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
                # A convolution's update is the product of matrices too: B has kernels of size 1.
                update = (factors[0].flatten(1) @ factors[1].flatten(1)).reshape(weight.shape)
                whole = at_least_float32(weight) + layer.scaling[adapter] * update
                folded[path] = torch.empty_like(weight).copy_(whole)
        return folded

    def _put_back(self) -> None:
        for weight, original in self._originals:
            weight.data = original
        self._originals = []

    def _parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        return {
            f"{path}.{factor}.weight": getattr(layer, factor)[adapter].weight
            for path, layer in self._layers.items()
            for factor in ("lora_A", "lora_B")
        }

    def _initial_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for key, parameter in self.trainable().items():
            value = torch.zeros(parameter.shape, dtype=parameter.dtype)
            if ".lora_A." in key:
                generator = torch_generator(self._seed, "lora", key)
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            state[key] = value
        return state

    def prepare_networks(self, prepare: Callable[[ModelMixin], object]) -> None:
        """Apply a change of layout or execution to the network, which all versions share."""
        prepare(self.network)

    def peft_config(self, alpha: float) -> LoraConfig:
        """The adapter's peft configuration at a given alpha."""
        return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(self.target_modules))


def _refuse_unfoldable(path: str, module: nn.Module) -> None:
    groups = getattr(module, "groups", 1)
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and groups == 1:
        return
    what = f"a {type(module).__name__}" + (f" in {groups} groups" if groups != 1 else "")
    raise PolicyError(
        f"explore.merge_lora=true: {path} is {what}, whose update is no weight of the module's own shape; "
        "leave it out of tuning.lora.target_modules, or set explore.merge_lora=false"
    )


def check_targets(network: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise PolicyError if no LoRA target matches a module, naming what exists."""
    names = [f".{name}" for name, _ in network.named_modules() if name]
    bound = {target: any(name.endswith(f".{target}") for name in names) for target in targets}
    if not any(bound.values()):
        layers = [
            name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        ]
        endings = {".".join(name.split(".")[-count:]) for name in layers for count in (1, 2)}
        near = (difflib.get_close_matches(target, endings, n=3, cutoff=0.4) for target in targets)
        shown = list(dict.fromkeys(itertools.chain(*near))) or sorted(endings)[:8]
        raise PolicyError(
            f"tuning.lora.target_modules={list(targets)}: no module of {type(network).__name__} has such a "
            f"name; nearest existing names: {', '.join(shown)}"
        )
    for target, found in bound.items():
        if not found:
            _log.warning("tuning.lora.target_modules: %r matches no module and is ignored", target)
