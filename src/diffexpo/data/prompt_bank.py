"""Embeddings of prompts in the files of a run: encoded once, by whichever process, and read row by row.

    prompts/<number>-r<rank>.safetensors      one shape of embeddings: a tensor (N,...) for each name,
                                              digest (N,16) of the texts, checksum (N,) of the rows

A row is read from its file when it is needed, so memory does not grow with the prompts. What the files hold
can be made again: one that is damaged, or of another text encoder, is removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from diffexpo.bounded.texts import parse_json
from diffexpo.data.sharing import Processes
from diffexpo.files import TEMPORARY, write_bytes
from diffexpo.types import Conditioning

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_INDEX = ("digest", "checksum")
_FILE_BYTES = 64 * 2**20
_SPARED = 4
"""A new file is written where the disk has room for this many of its size."""


class _Tensor(NamedTuple):
    """Rows of one name in a file: numbers, shape of a row, where the first begins, bytes of each."""

    kind: torch.dtype
    shape: tuple[int, ...]
    start: int
    row_bytes: int


class _File(NamedTuple):
    path: Path
    tensors: dict[str, _Tensor]
    checksums: list[int]


class PromptBank:
    """A folder of embeddings.

    Args:
        folder: Made at the first write.
        owner: Fingerprint of the policy that encodes.
        world: The processes that share the folder and the work.
    """

    def __init__(self, folder: Path, owner: str, world: Processes) -> None:
        self._folder, self._owner, self._world = folder, owner, world
        self._files: list[_File] = []
        self._known: set[str] = set()
        self._rows: dict[bytes, tuple[int, int]] = {}  # digest of a text -> file, row
        if world.rank == 0:
            self._remove_foreign()
        world.barrier()
        self._read_new()

    def __contains__(self, text: str) -> bool:
        return _digest(text) in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, texts: Sequence[str], encode: Callable[[str], Conditioning]) -> None:
        """Encode the texts that are not there yet, each process its share; all call it with the same."""
        missing = [text for text in texts if text not in self]
        number = len(self._known)
        waiting: dict[str, list[tuple[bytes, Conditioning]]] = {}
        size = 0
        for text in missing[self._world.rank :: self._world.size]:
            row = encode(text)
            size += sum(tensor.nbytes for tensor in row.tensors.values())
            waiting.setdefault(_shape_name(row), []).append((_digest(text), row))
            if size >= _FILE_BYTES:
                if not self._has_room(size):
                    waiting = {}
                    break
                number, waiting, size = self._write(number, waiting), {}, 0
        if waiting and self._has_room(size):
            self._write(number, waiting)
        self._world.barrier()
        self._read_new()
        self._world.barrier()  # nobody numbers new files before all have seen these

    def read(self, text: str) -> Conditioning | None:
        """A text's embedding (1,...); None if it is not there or no longer what was written."""
        place = self._rows.get(_digest(text))
        if place is None:
            return None
        file, row = self._files[place[0]], place[1]
        tensors, checksum = {}, 0
        try:
            with open(file.path, "rb") as opened:
                for name, tensor in file.tensors.items():
                    data = bytearray(
                        os.pread(opened.fileno(), tensor.row_bytes, tensor.start + row * tensor.row_bytes)
                    )
                    checksum = zlib.crc32(data, checksum)
                    tensors[name] = torch.frombuffer(data, dtype=tensor.kind).reshape(1, *tensor.shape)
        except (OSError, ValueError, RuntimeError):
            return None
        return Conditioning(tensors) if checksum == file.checksums[row] else None

    # ---- inside --------------------------------------------------------------------------------------------

    def _has_room(self, size: int) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._folder).free > _SPARED * size

    def _write(self, number: int, waiting: Mapping[str, Sequence[tuple[bytes, Conditioning]]]) -> int:
        for rows in waiting.values():
            names = list(rows[0][1].tensors)
            tensors = {name: torch.cat([row.tensors[name] for _, row in rows]).contiguous() for name in names}
            digests = torch.frombuffer(bytearray(b"".join(digest for digest, _ in rows)), dtype=torch.uint8)
            checksums = [_checksum(row.tensors[name] for name in sorted(names)) for _, row in rows]
            index = {"digest": digests.reshape(-1, 16), "checksum": torch.tensor(checksums)}
            path = self._folder / f"{number:06d}-r{self._world.rank:02d}.safetensors"
            write_bytes(path, safetensors.torch.save(tensors | index, {"owner": self._owner}))
            number += 1
        return number

    def _read_new(self) -> None:
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name not in self._known:
                self._known.add(path.name)
                found = _open(path, self._owner)
                if found is None:
                    continue
                file, digests = found
                for row, digest in enumerate(digests):
                    self._rows[digest] = (len(self._files), row)
                self._files.append(file)

    def _remove_foreign(self) -> None:
        for path in self._folder.glob(f"*{TEMPORARY}"):
            path.unlink()
        for path in self._folder.glob("*.safetensors"):
            if _open(path, self._owner) is None:
                path.unlink()


def _open(path: Path, owner: str) -> tuple[_File, list[bytes]] | None:
    """A file and the digests of its rows; None if it is damaged or of another owner."""
    try:
        with open(path, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = parse_json(opened.read(length))
            is_own = header.pop("__metadata__")["owner"] == owner
            end = max(entry["data_offsets"][1] for entry in header.values())
            if not is_own or path.stat().st_size != 8 + length + end:
                return None
            index = {}
            for name in _INDEX:
                first, last = header.pop(name)["data_offsets"]
                opened.seek(8 + length + first)
                index[name] = opened.read(last - first)
            tensors = {name: _tensor(header[name], 8 + length) for name in sorted(header)}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return None
    digests = [index["digest"][k : k + 16] for k in range(0, len(index["digest"]), 16)]
    checksums = torch.frombuffer(bytearray(index["checksum"]), dtype=torch.int64).tolist()
    return _File(path, tensors, checksums), digests


def _tensor(entry: Mapping[str, Any], start: int) -> _Tensor:
    first, last = entry["data_offsets"]
    count, *shape = entry["shape"]
    return _Tensor(_TYPES[entry["dtype"]], tuple(shape), start + first, (last - first) // count)


def _checksum(tensors: Iterable[Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        data: Any = tensor.contiguous().view(torch.uint8).numpy()
        checksum = zlib.crc32(data, checksum)
    return checksum


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _shape_name(row: Conditioning) -> str:
    return str([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(row.tensors.items())])
