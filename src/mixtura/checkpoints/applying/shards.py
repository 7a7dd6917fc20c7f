"""Writing safetensors files whose header is known before their first byte is.

A `Unit` writes one or a few tensors; units are packed into shards in order. Offsets follow from the
sizes alone, so the same units give the same bytes whatever was interrupted, and no more is held in
memory than a unit asks for.
"""

from __future__ import annotations

import errno
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, final

import torch
from torch import Tensor

from mixtura.checkpoints.viewing.headers import DTYPES
from mixtura.checkpoints.viewing.weight_files import SINGLE_FILE

UNFINISHED_SUFFIX = ".unfinished"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@final
@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the new checkpoint: its on-disk name, dtype and shape.

    ``foreign`` is the name of a type that PyTorch does not know, and how many bytes the tensor has.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    foreign: tuple[str, int] | None = None

    @property
    def type_name(self) -> str:
        """The type, as the file's header calls it."""
        return _DTYPE_NAMES[self.dtype] if self.foreign is None else self.foreign[0]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        if self.foreign is not None:
            return self.foreign[1]
        return math.prod(self.shape) * self.dtype.itemsize


@final
class Sink:
    """Takes the bytes of the tensors of one shard, in any order."""

    def __init__(self, stream: BinaryIO, offsets: dict[str, int], advance: Callable[[int], None]) -> None:
        self._stream = stream
        self._offsets = offsets
        self._advance = advance

    def write(self, name: str, content: Tensor, offset: int = 0) -> None:
        """Write a tensor, or a piece of it that starts `offset` bytes into it."""
        flat = content.contiguous().reshape(-1).view(torch.uint8)
        self._stream.seek(self._offsets[name] + offset)
        self._stream.write(flat.numpy().data)
        self._advance(flat.numel())


class Unit(ABC):
    """One step of writing: tensors that belong together and are written while one thing is in memory."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[OutputTensor, ...]:
        """What it writes, known before it does."""

    @abstractmethod
    def write(self, sink: Sink) -> None:
        """Write all of them.

        Raises:
            CheckpointError: what it reads is damaged.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


@final
@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its name and what writes it."""

    name: str
    units: tuple[Unit, ...]

    @cached_property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """Its tensors as they lie in the file: the widest dtype first, so that each is aligned."""
        tensors = [tensor for unit in self.units for tensor in unit.tensors]
        return tuple(sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name)))

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes: the length of the JSON, and the JSON padded to eight bytes."""
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for tensor in self.tensors:
            fields[tensor.name] = {
                "dtype": tensor.type_name,
                "shape": list(tensor.shape),
                "data_offsets": [start, start + tensor.num_bytes],
            }
            start += tensor.num_bytes
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Write the file under another name and give it its own when all of it is on the disk.

        Args:
            folder: where it goes.
            advance: called with the number of bytes just written; what it raises stops the writing.
        """
        unfinished = folder / (self.name + UNFINISHED_SUFFIX)
        with unfinished.open("wb") as stream:
            self._reserve(stream)
            stream.write(self.header)
            sink = Sink(stream, self._offsets(), advance)
            for unit in self.units:
                unit.write(sink)
            flush_to_disk(stream)
        unfinished.replace(folder / self.name)
        sync_folder(folder)

    def _offsets(self) -> dict[str, int]:
        offsets = {}
        position = len(self.header)
        for tensor in self.tensors:
            offsets[tensor.name] = position
            position += tensor.num_bytes
        return offsets

    def _reserve(self, stream: BinaryIO) -> None:
        """Take the file's space at once, so that a full disk is found before the work and not after it."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(stream.fileno(), 0, self.num_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            else:
                return
        stream.truncate(self.num_bytes)


def pack_shards(units: Sequence[Unit], shard_bytes: int) -> tuple[Shard, ...]:
    """Distribute units, in order, over files of at most `shard_bytes`; a larger unit has its own file."""
    groups: list[list[Unit]] = []
    filled = 0
    for unit in units:
        if not groups or filled + unit.num_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += unit.num_bytes
    if len(groups) == 1:
        return (Shard(SINGLE_FILE, tuple(groups[0])),)
    total = len(groups)
    return tuple(
        Shard(f"model-{number:05}-of-{total:05}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard]) -> str:
    """The file that says which shard holds which tensor, as transformers reads it."""
    where = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    size = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    values = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(values, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    with unfinished.open("wb") as stream:
        stream.write(text.encode())
        flush_to_disk(stream)
    unfinished.replace(path)


def flush_to_disk(stream: BinaryIO) -> None:
    """Return once the bytes of an open file are on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Return once a folder's entries are on the disk, where the system can say so."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
