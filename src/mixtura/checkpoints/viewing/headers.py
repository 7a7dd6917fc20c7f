"""Reading safetensors files without mapping them into memory.

A file is 8 bytes of header length, a JSON header naming every tensor with its type, shape and byte
range, and the bytes. Tensors are read with positioned reads into buffers of their own, so that the
resident memory of a process holds what was asked for and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from mixtura.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_MAX_HEADER_BYTES = 512 << 20


class TensorEntry(NamedTuple):
    """One stored tensor: its file, type, shape and where its bytes are.

    A tuple, because a large checkpoint has a hundred thousand of them.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises `CheckpointError` where the file is missing, is not safetensors or is shorter than its
    header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(file, "its header is cut off or it is not a safetensors file")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; check that the download finished"
        ) from None
    except ValueError:
        raise _damaged(file, "its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    return {name: _entry(file, name, item, start, size) for name, item in header.items()}


def _entry(file: Path, name: str, item: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype_name, shape = item["dtype"], tuple(item["shape"])
        first, last = item["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"its header does not describe {name}") from None
    if dtype_name not in DTYPES:
        raise _damaged(file, f"{name} has the type {dtype_name}, which is not known")
    dtype = DTYPES[dtype_name]
    if last - first != math.prod(shape) * dtype.itemsize:
        raise _damaged(file, f"{name} has {last - first} bytes for shape {list(shape)} of {dtype_name}")
    if start + last > size:
        missing = start + last - size
        raise _damaged(file, f"it is truncated: {name} ends {missing} bytes after the end of the file")
    return TensorEntry(name, file, dtype, shape, start + first, last - first)


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {why}; download or write it again")


@final
class TensorFiles:
    """Positioned reads from the files of one checkpoint; closes them when it is let go."""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self.entries = entries
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or a slice of its first axis, read from disk into a buffer of its own."""
        entry = self.entries[name]
        if rows is None or not entry.shape:
            return self._read(entry, entry.offset, entry.num_bytes, entry.shape)
        first, last, step = rows.indices(entry.shape[0])
        assert step == 1
        row_bytes = entry.num_bytes // max(entry.shape[0], 1)
        shape = (last - first, *entry.shape[1:])
        return self._read(entry, entry.offset + first * row_bytes, (last - first) * row_bytes, shape)

    def _read(self, entry: TensorEntry, offset: int, num_bytes: int, shape: Sequence[int]) -> Tensor:
        if num_bytes == 0:
            return torch.empty(shape, dtype=entry.dtype)
        # Allocated by torch, not as a bytearray: aligned for vector kernels and not zeroed first.
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        done = 0
        while done < num_bytes:
            count = self._read_into(view[done:], entry.file, offset + done)
            if count == 0:
                raise _damaged(entry.file, f"it ended while {entry.name} was read")
            done += count
        return buffer.view(entry.dtype).reshape(shape)

    def _read_into(self, view: memoryview, file: Path, offset: int) -> int:
        """Bytes read; less than there is room for at the end of the file, or by the system's choice."""
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor(file), [view], offset)
        # Opened anew, because threads would share the position of one descriptor.
        with file.open("rb", buffering=0) as opened:
            opened.seek(offset)
            return opened.readinto(view) or 0

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._descriptors[file]


def _close_all(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
