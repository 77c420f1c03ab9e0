"""Files of latents: those of one unit, by sample id, and packs of many units, by row.

A pack is a safetensors file that is read through memory mapping, so a row costs the same whatever its size:

    latents.<k> (M,C,h,w)     the latents of each type and shape, those of smaller rows first
    group, position (N,)      of each row: its k, and its place in latents.<k>
    digest, row (N,)          sorted digests of the sample ids, and the rows they are in
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors import safe_open
from safetensors.numpy import save

from diffexpo.bounded.texts import parse_json
from diffexpo.data.shards import damage, damaged
from diffexpo.errors import StoreError
from diffexpo.files import replacing, write_bytes

Kind = tuple[str, tuple[int, ...]]
"""Type of the numbers, as safetensors names it, and shape of a sample's latents."""

Reader = Callable[[], Iterator[tuple[int, memoryview]]]
"""Gives (row, its latents) of every row in order, each time it is called."""

_TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64, "U64": np.uint64}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_FLOATS = tuple(np.dtype(kind) for name, kind in _TYPES.items() if name.startswith("F"))
_INDEX = ("digest", "row", "group", "position")


def check_latents(ids: Sequence[str], latents: Sequence[np.ndarray] | ArrayLike) -> dict[str, np.ndarray]:
    """The latents by sample id; a StoreError unless there is one float array (C,h,w) for each id."""
    arrays = latents if isinstance(latents, list) else list(np.asarray(latents))
    if len(arrays) != len(ids):
        raise StoreError(
            f"{len(ids)} samples came with {len(arrays)} latents; there must be an array for each"
        )
    for sample_id, array in zip(ids, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype not in _FLOATS:
            raise StoreError(
                f"latents of {sample_id!r} are {array!r:.80}; they must be a float array (C,h,w)"
            )
    return dict(zip(ids, arrays, strict=True))


def digests_of(ids: Sequence[str]) -> np.ndarray:
    """64-bit digests (N,) of sample ids, by which packs find them."""
    parts = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids]
    return np.frombuffer(b"".join(parts), "<u8")


# ---- of one unit -------------------------------------------------------------------------------------------


def write_latents(path: Path, latents: Mapping[str, np.ndarray]) -> str:
    """Write arrays by sample id, bit for bit; returns the file's SHA-256."""
    # safetensors copies raw memory: an array that is a view would be written in the wrong order
    data = save(
        {key: np.ascontiguousarray(array) for key, array in latents.items()}, {"format": "diffexpo-latents-1"}
    )
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


class LatentFile:
    """A memory-mapped file of one unit; `names` are its sample ids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with damage(path, "is missing although its samples are in the store"):
            file: Any = safe_open(str(path), framework="numpy")
        self._file = file
        self.names = frozenset(file.keys())

    def read(self, sample_id: str) -> np.ndarray:
        """A copy of one sample's latents (C,h,w)."""
        if sample_id not in self.names:
            raise damaged(self.path, f"does not hold the latents of sample {sample_id!r}")
        return self._file.get_tensor(sample_id)


@dataclass(frozen=True)
class UnitBytes:
    """A whole unit's file in memory: the type and shape of each sample's latents, and their bytes."""

    kinds: dict[str, Kind]
    sha256: str
    _places: dict[str, tuple[int, int]]
    _data: bytes

    @staticmethod
    def read(path: Path) -> UnitBytes:
        """Read a file that `write_latents` wrote; damage is a StoreError."""
        with damage(path, "is missing although its samples are in the store"):
            data = path.read_bytes()
        start, header = _parse(path, data, len(data))
        kinds = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        places = {name: tuple(start + end for end in entry["data_offsets"]) for name, entry in header.items()}
        return UnitBytes(kinds, hashlib.sha256(data).hexdigest(), places, data)

    def bytes_of(self, sample_id: str) -> memoryview:
        """The latents of one sample."""
        first, last = self._places[sample_id]
        return memoryview(self._data)[first:last]


# ---- of many units -----------------------------------------------------------------------------------------


class LatentPack:
    """A memory-mapped pack of N rows; `digest` and `row` say where samples are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with damage(path, "is missing although a manifest names it"), open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start, header = _parse(path, self._map, len(self._map))
        try:
            arrays = {name: self._array(entry, start) for name, entry in header.items()}
            self.digest, self.row, self._group, self._position = (arrays[name] for name in _INDEX)
            self._latents = [arrays[f"latents.{k}"] for k in range(len(arrays) - len(_INDEX))]
        except (KeyError, ValueError, TypeError) as error:
            raise damaged(path, f"is no pack of latents ({error!r})") from error

    def __len__(self) -> int:
        return len(self._group)

    def view(self, row: int) -> np.ndarray:
        """The latents (C,h,w) of a row, read-only and not copied."""
        return self._latents[self._group[row]][self._position[row]]

    def _array(self, entry: Mapping[str, Any], start: int) -> np.ndarray:
        kind, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
        count = int(np.prod(shape))
        if not count:
            return np.empty(shape, kind)
        return np.frombuffer(self._map, kind, count, start + entry["data_offsets"][0]).reshape(shape)


def write_pack(path: Path, ids: Sequence[str], kinds: Sequence[Kind], read: Reader) -> str:
    """Write a pack of rows.

    Args:
        ids, kinds: Sample id, type and shape of each row.
        read: Is called once for each type and shape.
    Returns:
        The file's SHA-256.
    """
    digests = digests_of(ids)
    order = np.argsort(digests, kind="stable")
    # wider numbers first, so that all are aligned
    groups = sorted(set(kinds), key=lambda kind: (-np.dtype(_TYPES[kind[0]]).itemsize, kind[1]))
    group = np.array([groups.index(kind) for kind in kinds], np.int64)
    position = np.zeros(len(ids), np.int64)
    for k in range(len(groups)):
        position[group == k] = np.arange((group == k).sum())
    arrays = dict(zip(_INDEX, (digests[order], order.astype(np.int64), group, position), strict=True))
    shapes = [(name, _NAMES[array.dtype], array.shape, array.nbytes) for name, array in arrays.items()]
    for k, (kind, shape) in enumerate(groups):
        count = int((group == k).sum())
        size = count * int(np.prod(shape)) * np.dtype(_TYPES[kind]).itemsize
        shapes.append((f"latents.{k}", kind, (count, *shape), size))
    with replacing(path) as temporary, open(temporary, "wb") as file:
        sha256 = hashlib.sha256()
        for part in _pack_parts(_header(shapes), arrays, group, read):
            sha256.update(part)
            file.write(part)
    return sha256.hexdigest()


def _pack_parts(
    header: bytes, arrays: Mapping[str, np.ndarray], group: np.ndarray, read: Reader
) -> Iterator[bytes | memoryview]:
    yield header
    for array in arrays.values():
        yield array.tobytes()
    for k in range(int(group.max(initial=-1)) + 1):
        for row, data in read():
            if group[row] == k:
                yield data


def _header(shapes: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The beginning of a safetensors file whose tensors follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "diffexpo-latents-2"}}
    end = 0
    for name, kind, shape, size in shapes:
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(path: Path, data: bytes | mmap.mmap, size: int) -> tuple[int, dict[str, Any]]:
    """(where numbers begin, entry of each tensor) of a safetensors file; one cut short is a StoreError."""
    try:
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = parse_json(data[8 : 8 + length])
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise damaged(path, f"is truncated or damaged ({error!r:.200})") from error
    if 8 + length + end != size:
        raise damaged(path, f"is truncated or damaged (it has {size} bytes, not {8 + length + end})")
    return 8 + length, header
