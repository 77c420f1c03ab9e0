"""An accelerator that is not there: the torch device `pretend:0`, whose tensors lie in main memory.

It is torch's own extension point for backends (PrivateUse1) with kernels in Python: each operation runs as the CPU's kernel on the same
memory, so results are the CPU's. What differs from the CPU is what differs on CUDA:

- `tensor.numpy()` and NumPy functions refuse its tensors; `.cpu()`, `.to("cpu")`, `.tolist()`, `.item()`, `float()` and `bool()` copy to
  the host, and `counted_waits` counts them by the place in `diffexpo` that asked.
- Operations on its tensors and the CPU's refuse, but for numbers: a 0-dimensional CPU tensor in an elementwise operation, and CPU indices.
- Its random numbers come of its own generator; a CPU generator is refused.
- `torch.accelerator` names it, and `torch.autocast("pretend")` is its own.

Not pretended: streams (every operation is finished when it returns), pinned memory, kernels that round in another way, memory that runs out, and
several devices.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import diffexpo

NAME = "pretend"
SOURCES = str(Path(diffexpo.__file__).parent)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten
# How often memory of tensors that are gone is looked for.
ALLOCATIONS_PER_SWEEP = 512
# Operations that take a 0-dimensional CPU tensor although torch does not mark them as elementwise.
TAKES_NUMBERS = {
    "aten::index_put_", "aten::_index_put_impl_", "aten::masked_fill", "aten::masked_fill_",
    "aten::fill_",
}  # fmt: skip
TAKES_CPU_INDICES = {
    "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index",
}  # fmt: skip
# Their result's size depends on the values: CUDA waits for them.
WAITS = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive",
}  # fmt: skip

# What autocast computes in half and in single precision on CUDA, as far as networks here use it.
IN_HALF = [
    "linear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d",
    "convolution", "conv_transpose2d.input", "scaled_dot_product_attention",
]  # fmt: skip
IN_SINGLE = [
    "exp", "log", "pow.Tensor_Scalar", "rsqrt", "softmax.int", "log_softmax.int", "layer_norm",
    "group_norm", "rms_norm", "norm.Scalar", "mse_loss", "prod", "sum", "sum.dim_IntList", "cumsum",
    "softplus", "cosine_similarity",
]  # fmt: skip

waits: Counter[Wait] | None = None


class Wait(NamedTuple):
    """Where the host waited for the device: the innermost function of `diffexpo` ("file.py function"), torch's operation ("copy", "number"
    or the operator), and all functions of ours that led there."""

    place: str
    operation: str
    callers: frozenset[str]


class Memory:
    """Which main memory holds a storage of the device, both ways, for as long as the storage lives."""

    def __init__(self) -> None:
        self._host: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._since_sweep = 0
        self._lock = (
            threading.Lock()
        )  # images are scored in a thread of its own, and gradients are made in another

    def place(self, host: Tensor) -> torch.UntypedStorage:
        """A new storage of the device on the memory of a CPU tensor that nobody else writes to."""
        memory = host.untyped_storage()
        storage = torch._C._construct_storage_from_data_pointer(
            memory.data_ptr(), torch.device(NAME, 0), memory.nbytes()
        )
        with self._lock:
            self._host[storage._cdata] = (StorageWeakRef(storage), memory)
            self._since_sweep += 1
            if self._since_sweep > ALLOCATIONS_PER_SWEEP:
                self._sweep()
        return storage

    def __len__(self) -> int:
        """Storages that live."""
        with self._lock:
            self._sweep()
        return len(self._host)

    def host(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        with self._lock:
            return self._host[storage._cdata][1]

    def _sweep(self) -> None:
        self._host = {key: entry for key, entry in self._host.items() if not entry[0].expired()}
        self._since_sweep = 0


memory = Memory()


class Random:
    """The device's generator. What draws runs on the CPU's kernels with this state in the place of the CPU's."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        others = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(others)


random = Random()


class Module:
    """What torch asks a device's module, `torch.pretend`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return is_present

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        random.state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: object = None) -> Tensor:
        return random.state.clone()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        random.state = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @contextmanager
    def device(self, index: object) -> Iterator[None]:
        yield


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """There is one, and it is ready."""

    def is_available(self) -> bool:
        return is_present

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class Traits(NamedTuple):
    """What matters of an operation: whether it waits for the device, draws, and takes numbers or indices of the CPU."""

    name: str
    waits: bool
    is_random: bool
    takes_numbers: bool
    indices: int


@functools.cache
def traits_of(operator: torch._ops.OpOverload) -> Traits:
    schema = operator._schema
    gives_tensors = not schema.returns or any("Tensor" in str(one.type) for one in schema.returns)
    names = [argument.name for argument in schema.arguments]
    return Traits(
        schema.name,
        waits=not gives_tensors or schema.name in WAITS,
        is_random=torch.Tag.nondeterministic_seeded in operator.tags,
        takes_numbers=torch.Tag.pointwise in operator.tags or schema.name in TAKES_NUMBERS,
        indices=names.index("indices") if schema.name in TAKES_CPU_INDICES else -2,
    )


@contextmanager
def counted_waits() -> Iterator[Counter[Wait]]:
    """How often each place waited for the device inside the block, to have values on the host or to learn how many there are."""
    global waits
    outer, waits = waits, Counter()
    try:
        yield waits
    finally:
        waits = outer


def on_host(tensor: Tensor) -> Tensor:
    """The memory of a tensor of the device, as a CPU tensor."""
    view = torch.empty(0, dtype=tensor.dtype)
    storage = memory.host(tensor.untyped_storage())
    return view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def on_device(host: Tensor) -> Tensor:
    """A tensor of the device on the memory of a CPU tensor that nobody else writes to."""
    return _in_storage(host, memory.place(host))


def fallback(operator: torch._ops.OpOverload, *args: object, **kwargs: object) -> object:
    """Every operation of which nothing else is said: the CPU's kernel on the same memory."""
    traits = traits_of(operator)
    if traits.waits or (traits.indices >= 0 and _has_mask(args[traits.indices])):
        _count(traits.name)
    given: list[tuple[Tensor, Tensor]] = []
    values = [_to_host(value, given, traits, place) for place, value in enumerate(args)]
    named = {key: _to_host(value, given, traits, -1) for key, value in kwargs.items()}
    if traits.is_random:
        with random.used():
            found = operator(*values, **named)
    else:
        found = operator(*values, **named)
    for host, tensor in given:
        _follow(tensor, host)
    return _to_device(found, given)


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """`target.copy_(source)`, at least one of which is on the device."""
    if target.device.type == "cpu":
        _count("copy")
    _writable(target).copy_(_writable(source))
    return target


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return copy_from(source, target)


def read_number(tensor: Tensor) -> object:
    """`.item()`, `float()`, `bool()`: the device's value on the host."""
    _count("number")
    return on_host(tensor).item()


def convolution(*args: object) -> Tensor:
    return fallback(aten.convolution.default, *args)


def convolution_backward(gradient: Tensor, values: Tensor, weight: Tensor, *args: object) -> object:
    *settings, wanted = args
    return fallback(
        aten.convolution_backward.default, gradient, values, weight, [weight.shape[0]], *settings, wanted
    )


def autocast(name: str, target: Callable[[], torch.dtype]) -> Callable[..., object]:
    """The kernel under autocast: floating arguments of the device, but not float64, in the target's type."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")

    def kernel(*args: object, **kwargs: object) -> object:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            dtype = target()
            return operator(
                *(_cast(one, dtype) for one in args),
                **{key: _cast(one, dtype) for key, one in kwargs.items()},
            )

    return kernel


def on_cpu(name: str) -> Callable[..., object]:
    """The CPU's own kernel where torch would compose the operation of others."""
    return functools.partial(fallback, getattr(aten, name).default)


def assign_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`, which CUDA's tensors allow for one of the CPU too: they change places, as torch does it for modules."""
    if tensor.device.type == value.device.type:
        TENSOR_DATA.__set__(tensor, value)
        return
    other = (
        torch.nn.Parameter(value.detach(), tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter)
        else value.detach()
    )
    torch._C._swap_tensor_impl(tensor, other)


def install() -> torch.device:
    """Register the device with torch, for the rest of this process; again and again does nothing."""
    global libraries
    if not libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=Module(), hook=Hooks())
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(fallback, "PrivateUse1")
        everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        own = torch.library.Library("aten", "IMPL")
        for name, kernel in KERNELS.items():
            own.impl(name, kernel, "PrivateUse1")
        for name in IN_HALF:
            own.impl(name, autocast(name, lambda: torch.get_autocast_dtype(NAME)), "AutocastPrivateUse1")
        for name in IN_SINGLE:
            own.impl(name, autocast(name, lambda: torch.float32), "AutocastPrivateUse1")
        torch.Tensor.data = property(TENSOR_DATA.__get__, assign_data)
        libraries = [everything, own]
    return torch.device(NAME, 0)


@contextmanager
def present() -> Iterator[torch.device]:
    """Inside the block `torch.accelerator` finds the device; outside it is only known by its name."""
    global is_present
    outer, is_present = is_present, True
    try:
        yield install()
    finally:
        is_present = outer


TENSOR_DATA = torch._C.TensorBase.data
KERNELS: dict[str, Callable[..., object]] = {
    "copy_": copy_,
    "_copy_from": copy_from,
    "_copy_from_and_resize": copy_from,
    "_local_scalar_dense": read_number,
    "convolution_overrideable": convolution,
    "convolution_backward_overrideable": convolution_backward,
    # Torch's composed one does not take pictures whose channels lie innermost.
    "native_group_norm": on_cpu("native_group_norm"),
    "native_group_norm_backward": on_cpu("native_group_norm_backward"),
}
is_present = False
libraries: list[torch.library.Library] = []


def _cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(one, dtype) for one in value)
    if isinstance(value, Tensor) and value.device.type == NAME and value.is_floating_point():
        return value if value.dtype == torch.float64 else value.to(dtype)
    return value


def _has_mask(indices: Iterable[Tensor | None]) -> bool:
    """Whether a tensor is indexed by a mask of the device: the device says how many rows there are."""
    return any(one is not None and one.dtype == torch.bool and one.device.type == NAME for one in indices)


def _count(operation: str) -> None:
    """One more wait, under the functions of ours that led to it."""
    if waits is None:
        return
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(SOURCES) and not code.co_name.startswith("<"):
            found.append(f"{Path(code.co_filename).relative_to(SOURCES)} {code.co_name}")
        frame = frame.f_back
    waits[Wait(found[0] if found else "elsewhere", operation, frozenset(found))] += 1


def _to_host(value: object, given: list[tuple[Tensor, Tensor]], traits: Traits, place: int) -> object:
    """An argument for the CPU's kernel; what it is of the device is noted. RuntimeError for a CPU tensor or generator."""
    if isinstance(value, Tensor):
        if value.device.type == NAME:
            for host, tensor in given:
                if tensor is value:
                    return host
            given.append((on_host(value), value))
            return given[-1][0]
        if not (place == traits.indices or (value.ndim == 0 and traits.takes_numbers)):
            raise RuntimeError(
                f"{traits.name}: Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and {value.device}!"
            )
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(one, given, traits, place) for one in value)
    if isinstance(value, torch.Generator):
        found = value.device.type
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{found}'")  # noqa: TRY004
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _to_device(value: object, given: list[tuple[Tensor, Tensor]]) -> object:
    """A result of the CPU's kernel: an argument that was written to, a view of one, or something new."""
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(one, given) for one in value)
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()._cdata
    for host, tensor in given:
        if value is host:
            return tensor
        if storage == host.untyped_storage()._cdata:
            return _in_storage(value, tensor.untyped_storage())
    return on_device(value)


def _in_storage(like: Tensor, storage: torch.UntypedStorage) -> Tensor:
    made = torch._C._acc.create_empty_tensor([0], like.dtype)
    return _set(made, like, storage)


def _set(tensor: Tensor, like: Tensor, storage: torch.UntypedStorage) -> Tensor:
    where = (like.storage_offset(), list(like.size()), list(like.stride()))
    return aten.set_.source_Storage_storage_offset.redispatch(CPU_KERNEL, tensor, storage, *where)


def _follow(tensor: Tensor, host: Tensor) -> None:
    """The tensor gets the shape and memory that an operation in place gave its CPU view."""
    if host.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        _set(tensor, host, memory.place(host))
    elif (host.size(), host.stride()) != (tensor.size(), tensor.stride()):
        _set(tensor, host, tensor.untyped_storage())


def _writable(tensor: Tensor) -> Tensor:
    return on_host(tensor) if tensor.device.type == NAME else tensor
