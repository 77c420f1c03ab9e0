"""Named versions of the trainable weights on one base: adapters (LoRA) or module copies (full fine-tuning).

Both satisfy `diffexpo.types.WeightSets` and add `network` (the module that runs now), `base_module` and
`fingerprint(name)`. "current" is trained, "base" never changes, "reference" is the base until something is
copied or loaded onto it.
"""

from __future__ import annotations

import copy as copies
import difflib
import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffexpo.config.schema import LoraConfig as LoraSettings
from diffexpo.config.schema import TuningConfig
from diffexpo.errors import PolicyError
from diffexpo.rng import torch_generator

CURRENT, BASE, REFERENCE = "current", "base", "reference"
# Where adapters go unless the settings or the family say otherwise: the attention's projections.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_log = logging.getLogger("diffexpo")


def _check_state(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Names and shapes must match exactly."""
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise PolicyError(
            f"weights {name!r}: {len(missing)} tensors missing (first: {missing[:1]}), {len(unknown)} "
            f"unknown (first: {unknown[:1]}); expected the {len(own)} names of this model's trainable weights"
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise PolicyError(
                f"weights {name!r}: {key} has shape {tuple(state[key].shape)}, expected "
                f"{tuple(tensor.shape)}; the file belongs to another model or LoRA rank"
            )


def _unknown(name: str, names: list[str]) -> PolicyError:
    return PolicyError(f"weights {name!r}: no such version; expected one of {', '.join(names)}")


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in sorted order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LoraWeightSets:
    """Versions as named peft adapters on one frozen base; the base itself is "all adapters off".

    No second model is held: "base" (and "reference", until something is copied onto it) runs the frozen
    network alone, and each other version costs only its low-rank factors.

    Args:
        network: The denoiser; gets adapters injected in place, its own weights are frozen.
        settings: Rank, alpha, target modules.
        seed: Run seed: the A factors of "current" are keyed by (seed, "lora", name). B starts at 0, so
            current equals base.
    Raises:
        PolicyError: no module matches, or a matched one cannot carry an adapter.
    """

    kind = "lora"

    def __init__(self, network: nn.Module, settings: LoraSettings, seed: int) -> None:
        targets = LORA_TARGETS if settings.target_modules is None else settings.target_modules
        check_targets(network, targets)
        self.network = network
        self.base_module = network
        self.rank = settings.rank
        self.alpha = settings.rank if settings.alpha is None else settings.alpha
        self.target_modules = targets
        self._seed = seed
        # The adapter behind each version; None is "all adapters off". ModuleDict keys clash with its methods:
        # hence the prefix.
        self._adapters: dict[str, str | None] = {BASE: None, REFERENCE: None}
        network.requires_grad_(False)
        self._layers: dict[str, LoraLayer] = {}
        self._active = CURRENT
        self._add(CURRENT)
        self.load(CURRENT, self._initial_state())

    def names(self) -> list[str]:
        return sorted(self._adapters)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside the block the network runs with that version; the previous one comes back afterwards."""
        self._adapter(name)
        previous = self._active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(previous)

    def copy(self, source: str, target: str) -> None:
        """Make or overwrite `target` with the values of `source`, exactly.

        A version that equals the base by having no adapter is copied as such; onto "current" it is the
        initial adapter (B = 0).
        """
        adapter = self._adapter(source)
        self._refuse_base(target)
        if source == target:
            return
        if adapter is None and target != CURRENT:
            self._remove(target)
            self._adapters[target] = None
            return
        self.load(target, self.state(source))

    def drop(self, name: str) -> None:
        """Forget a version; "reference" falls back to the base."""
        self._adapter(name)
        self._refuse_base(name)
        if name in (CURRENT, self._active):
            raise PolicyError(f"weights {name!r}: in use, cannot be dropped")
        self._remove(name)
        if name == REFERENCE:
            self._adapters[REFERENCE] = None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of "current" by name, e.g. `mid_block...to_q.lora_A.weight`."""
        return self._parameters(CURRENT)

    def state(self, name: str) -> dict[str, Tensor]:
        """Detached CPU copy of a version. For the base it is the initial adapter, whose B is 0."""
        if self._adapter(name) is None:
            return self._initial_state()
        return {key: value.detach().cpu().clone() for key, value in self._parameters(name).items()}

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Make or overwrite a version from tensors whose names and shapes match exactly."""
        self._refuse_base(name)
        _check_state(name, state, self.trainable())
        if self._adapters.get(name) is None:
            self._add(name)
        with torch.no_grad():
            for key, parameter in self._parameters(name).items():
                parameter.copy_(state[key])

    def fingerprint(self, name: str) -> str:
        """sha256 of a version's values; every version without an adapter shares one."""
        return fingerprint_state(self.state(name))

    def _adapter(self, name: str) -> str | None:
        if name not in self._adapters:
            raise _unknown(name, self.names())
        return self._adapters[name]

    @staticmethod
    def _refuse_base(name: str) -> None:
        if name == BASE:
            raise PolicyError("weights 'base': never changes; write to another version")

    def _add(self, name: str) -> None:
        adapter = f"version_{name.replace('.', '_')}"
        # peft initialises from the global generator; the values are overwritten, its state must not move.
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config` attribute"
            )  # as intended
            try:
                inject_adapter_in_model(self.peft_config(self.alpha), self.network, adapter)
            except ValueError as error:
                raise PolicyError(
                    f"tuning.lora.target_modules={list(self.target_modules)}: {error}"
                ) from error
        self._layers = {
            path: layer for path, layer in self.network.named_modules() if isinstance(layer, LoraLayer)
        }
        for layer in self._layers.values():
            # Half-precision factors would lose their updates; peft casts the layer's input to the factors'
            # type.
            layer.lora_A[adapter].float()
            layer.lora_B[adapter].float()
        self._adapters[name] = adapter
        self.network.eval()
        self._activate(self._active)

    def _remove(self, name: str) -> None:
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            for layer in self._layers.values():
                layer.delete_adapter(adapter)
            self.network.peft_config.pop(adapter)
            self._activate(self._active)

    def _activate(self, name: str) -> None:
        adapter = self._adapters[name]
        for layer in self._layers.values():
            layer.set_adapter([] if adapter is None else [adapter], inference_mode=True)
        # "current" stays trainable while another version runs, so that a backward through an earlier forward
        # still reaches it.
        for parameter in self._parameters(CURRENT).values():
            parameter.requires_grad_(True)
        self._active = name

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        adapter = self._adapters[name]
        found: dict[str, nn.Parameter] = {}
        for path, layer in self._layers.items():
            found[f"{path}.lora_A.weight"] = layer.lora_A[adapter].weight
            found[f"{path}.lora_B.weight"] = layer.lora_B[adapter].weight
        return found

    def _initial_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for key, parameter in self.trainable().items():
            value = torch.zeros(parameter.shape, dtype=parameter.dtype)
            if ".lora_A." in key:
                generator = torch_generator(self._seed, "lora", key)
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            state[key] = value
        return state

    def prepare_networks(self, prepare: Callable[[nn.Module], object]) -> None:
        """Apply a change of layout or execution to the network, which all versions share."""
        prepare(self.network)

    def peft_config(self, alpha: float) -> LoraConfig:
        """The adapter's peft configuration at a given alpha."""
        return LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(self.target_modules))


class CopyWeightSets:
    """Versions as whole copies of the network, for full fine-tuning.

    "base" is a frozen copy made at once (everything else may change "current"). Frozen versions never change
    in place, so copying one frozen version to another name shares the module; a copy is made only when values
    differ.

    Args:
        network: The denoiser; every parameter becomes trainable except the inert ones.
        inert: Name prefixes of parameters that the family's forward pass computes and discards: no gradient can reach them.
    """

    kind = "full"

    def __init__(self, network: nn.Module, inert: tuple[str, ...] = ()) -> None:
        network.eval().requires_grad_(False)
        base = copies.deepcopy(network)
        self._inert = inert
        self._preparations: list[Callable[[nn.Module], object]] = []
        for parameter in self._parameters(network).values():
            parameter.requires_grad_(True)
        self.base_module = base
        self._versions: dict[str, nn.Module] = {BASE: base, REFERENCE: base, CURRENT: network}
        self._active = CURRENT

    @property
    def network(self) -> nn.Module:
        """The module that runs now."""
        return self._versions[self._active]

    def names(self) -> list[str]:
        return sorted(self._versions)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside the block the network is that version; the previous one comes back afterwards."""
        self._module(name)
        previous, self._active = self._active, name
        try:
            yield
        finally:
            self._active = previous

    def copy(self, source: str, target: str) -> None:
        """Make or overwrite `target` with the values of `source`, exactly."""
        module = self._module(source)
        self._refuse_base(target)
        if source == target:
            return
        if CURRENT in (source, target):
            self.load(target, self._parameters(module))
        else:
            self._versions[target] = module

    def drop(self, name: str) -> None:
        """Forget a version; "reference" falls back to the base."""
        self._module(name)
        self._refuse_base(name)
        if name in (CURRENT, self._active):
            raise PolicyError(f"weights {name!r}: in use, cannot be dropped")
        del self._versions[name]
        if name == REFERENCE:
            self._versions[REFERENCE] = self.base_module

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters of "current" by their name in the network."""
        return self._parameters(self._versions[CURRENT])

    def state(self, name: str) -> dict[str, Tensor]:
        """Detached CPU copy of a version's parameters."""
        # Contiguous, whatever the layout in memory: files take no other.
        return {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self._parameters(self._module(name)).items()
        }

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Make or overwrite a version from tensors whose names and shapes match exactly."""
        self._refuse_base(name)
        _check_state(name, state, self.trainable())
        module = self._versions.get(name)
        shared = sum(other is module for other in self._versions.values()) > 1
        if module is None or shared:
            # From the pristine base, not from "current": a training library may have wrapped the latter's
            # forward.
            module = copies.deepcopy(self.base_module)
            for prepare in self._preparations:
                prepare(module)
            self._versions[name] = module
        with torch.no_grad():
            for key, parameter in self._parameters(module).items():
                parameter.copy_(state[key])

    def fingerprint(self, name: str) -> str:
        """sha256 of a version's parameters."""
        return fingerprint_state(self.state(name))

    def prepare_networks(self, prepare: Callable[[nn.Module], object]) -> None:
        """Apply a change of layout or execution to every version, those made later included."""
        for module in {id(module): module for module in self._versions.values()}.values():
            prepare(module)
        self._preparations.append(prepare)

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: value for name, value in module.named_parameters() if not name.startswith(self._inert)}

    def _module(self, name: str) -> nn.Module:
        if name not in self._versions:
            raise _unknown(name, self.names())
        return self._versions[name]

    @staticmethod
    def _refuse_base(name: str) -> None:
        if name == BASE:
            raise PolicyError("weights 'base': never changes; write to another version")


def with_targets(tuning: TuningConfig, targets: tuple[str, ...]) -> TuningConfig:
    """The tuning with a family's own LoRA targets where the settings name none."""
    if tuning.lora.target_modules is not None:
        return tuning
    return tuning.model_copy(update={"lora": tuning.lora.model_copy(update={"target_modules": targets})})


def check_targets(network: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse LoRA targets that match no module, naming what exists.

    Raises:
        PolicyError: none of the endings is found.
    """
    names = [name for name, _ in network.named_modules() if name]
    bound = {
        target: any(name == target or name.endswith(f".{target}") for name in names) for target in targets
    }
    if not any(bound.values()):
        endings = {
            ending
            for name, module in network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
            for ending in (name.rsplit(".", 1)[-1], ".".join(name.split(".")[-2:]))
        }
        near = [
            match
            for target in targets
            for match in difflib.get_close_matches(target, endings, n=3, cutoff=0.4)
        ]
        shown = list(dict.fromkeys(near)) or sorted(endings)[:8]
        raise PolicyError(
            f"tuning.lora.target_modules={list(targets)}: no module of {type(network).__name__} has such a "
            f"name; nearest existing names: {', '.join(shown)}"
        )
    for target, found in bound.items():
        if not found:
            _log.warning("tuning.lora.target_modules: %r matches no module and is ignored", target)
