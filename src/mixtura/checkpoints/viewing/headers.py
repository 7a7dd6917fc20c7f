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

from mixtura.checkpoints.viewing.weight_files import PICKLE_ADVICE, stand_in
from mixtura.errors import CheckpointError, UnsupportedModelError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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
_START_BYTES = 512
_OTHER_FORMATS = {b"GGUF": "GGUF", b"\x89HDF": "HDF5", b"\x93NUM": "NumPy"}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorEntry(NamedTuple):
    """One stored tensor: its file, type, shape and where its bytes are.

    A tuple, because a large checkpoint has a hundred thousand of them. ``foreign`` names a type that
    PyTorch has no numbers for; ``dtype`` is then bytes, and the tensor is copied but never read.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    foreign: str | None = None


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises `CheckpointError` where the file is missing, is not safetensors or is shorter than its
    header says, and `UnsupportedModelError` where it is of another format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(_START_BYTES)
            length = int.from_bytes(start[:8], "little")
            _check_start(file, start, length, size)
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; check that the download finished"
        ) from None
    try:
        header = json.loads(text)
    except ValueError:
        raise _damaged(file, "its header is not valid JSON") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(file, name, item, 8 + length, size) for name, item in header.items()}


def _check_start(file: Path, start: bytes, length: int, size: int) -> None:
    """Raise an error that says what a file is where its first bytes are no whole safetensors header."""
    instead = stand_in(start)
    if instead is not None:
        raise CheckpointError(f"{file} {instead}")
    # The length of a header may happen to be the numbers that a pickle begins with.
    begins_well = start[8:9] == b"{" and length <= size - 8
    if start.startswith(_PICKLE_STARTS) and not begins_well:
        raise UnsupportedModelError(PICKLE_ADVICE.format(where=f"{file}, whatever its name,"))
    other = _OTHER_FORMATS.get(start[:4])
    if other is not None:
        raise UnsupportedModelError(
            f"{file} is a {other} file, whatever its name; use a safetensors checkpoint"
        )
    if size < 8:
        raise _damaged(file, "it is empty" if size == 0 else f"it ends after {size} bytes")
    if length > _MAX_HEADER_BYTES or start[8:9] not in (b"{", b"[", b""):
        raise _damaged(file, "it is not a safetensors file")
    if length > size - 8:
        raise _damaged(file, f"it is cut off within its header, after {size} of at least {length + 8} bytes")


def _entry(file: Path, name: str, item: Any, start: int, size: int) -> TensorEntry:
    try:
        dtype_name, shape = item["dtype"], tuple(item["shape"])
        first, last = item["data_offsets"]
        num_bytes, numbers = last - first, math.prod(shape)
        if not 0 <= first <= last or numbers < 0:
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"its header does not describe {name}") from None
    if start + last > size:
        missing = start + last - size
        raise _damaged(file, f"it is truncated: {name} ends {missing} bytes after the end of the file")
    if dtype_name not in DTYPES:
        # Whatever a later format brings: it matters only if the model needs this very tensor.
        return TensorEntry(name, file, torch.uint8, shape, start + first, num_bytes, str(dtype_name))
    dtype = DTYPES[dtype_name]
    if num_bytes != numbers * dtype.itemsize:
        raise _damaged(file, f"{name} has {num_bytes} bytes for shape {list(shape)} of {dtype_name}")
    return TensorEntry(name, file, dtype, shape, start + first, num_bytes)


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
        """A tensor, or a slice of its first axis, read from disk into a buffer of its own.

        Raises `UnsupportedModelError` for one of a type that PyTorch does not know.
        """
        entry = self.entries[name]
        if entry.foreign is not None:
            raise UnsupportedModelError(
                f"{name} has the type {entry.foreign}, which mixtura does not read; use a checkpoint "
                "in another format"
            )
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
