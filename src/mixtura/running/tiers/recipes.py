"""How one expert of a checkpoint comes to lie in a piece of memory, and what the kernels read there."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from mixtura.checkpoints.applying.packing import AsStored, PackExpert, expert_tensors
from mixtura.checkpoints.packed import (
    MATRICES,
    LayerRecord,
    MatrixRecord,
    part_name,
    read_expert,
    scales_part,
    values_part,
)
from mixtura.checkpoints.skeleton import CheckpointView
from mixtura.checkpoints.stores import Form
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.checkpoints.viewing.headers import TensorEntry
from mixtura.checkpoints.viewing.packed import PackedLayer
from mixtura.kernels import ExpertMatrices, ExpertTensors, dense_matrix
from mixtura.running.packing import packed_forms, scaled_units
from mixtura.running.tiers.reading import Range

# Vector loads start at multiples of this many bytes.
_ALIGNMENT: Final = 64
# Rules of transformers that put stored matrices one behind the other, and nothing else.
_STACKING: Final = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


class Part(NamedTuple):
    """Where one tensor of an expert lies in the expert's memory."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The tensor as a view of the expert's memory."""
        num_bytes = torch.Size(self.shape).numel() * self.dtype.itemsize
        return memory[self.start : self.start + num_bytes].view(self.dtype).view(self.shape)


class Recipe(ABC):
    """The experts of one layer: where their bytes are on disk and how they lie in memory.

    ``like`` are the sizes of an expert of plain numbers; None for experts in fewer bits.
    """

    num_experts: int
    like: ExpertTensors | None = None

    def owner(self, expert: int) -> int:
        """The expert whose bytes it has: itself, or the one it was merged with."""
        return expert

    @abstractmethod
    def form(self, expert: int) -> object:
        """What experts share that lie in memory in the same way."""

    @property
    def owners(self) -> list[int]:
        """Experts with bytes of their own, ascending."""
        return sorted({self.owner(expert) for expert in range(self.num_experts)})

    @abstractmethod
    def num_bytes(self, expert: int) -> int:
        """Memory that an expert takes."""

    @abstractmethod
    def ranges(self, expert: int, memory: Tensor) -> list[Range] | None:
        """What to read, and where to in the expert's memory; None where it must be converted first."""

    @abstractmethod
    def fill(self, expert: int, memory: Tensor) -> None:
        """Read an expert that must be converted, by the checkpoint's own view."""

    @abstractmethod
    def tensors(self, expert: int, memory: Tensor, dtype: torch.dtype) -> ExpertTensors:
        """The expert ready to multiply, as views of its memory where it is plain numbers."""

    @abstractmethod
    def matrices(self, expert: int, memory: Tensor) -> ExpertMatrices | None:
        """The expert as the compiled kernels read it in its memory; None where they cannot."""


def recipe_of(view: CheckpointView, layer: DiskLayer | PackedLayer, experts: Any) -> Recipe:
    """The recipe of a layer.

    Args:
        view: the checkpoint.
        layer: one of its layers.
        experts: the layer's module, its parameters on the meta device.
    """
    described = packed_forms(view, layer)
    if described is None:
        assert isinstance(layer, DiskLayer)
        return Plain(view, layer, experts)
    return Packed(view, layer, *described)


@final
class Plain(Recipe):
    """Experts of plain numbers, in the layout and the dtype of their module."""

    def __init__(self, view: CheckpointView, layer: DiskLayer, experts: Any) -> None:
        self.num_experts = layer.num_experts
        self._view = view
        self._layer = layer
        self._parts: dict[str, Part] = {}
        total = 0
        for name in layer.expert_parameters:
            shaped: Tensor = getattr(experts, name.rpartition(".")[2])
            self._parts[name] = Part(total, shaped.dtype, tuple(shaped.shape[1:]))
            total += _aligned(shaped[0].numel() * shaped.dtype.itemsize)
        self._num_bytes = total
        self._transposed = layer.layout.transposed
        made = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in self._parts.values()]
        up, down, *biases = made
        self.like = ExpertTensors(up, down, *(biases or (None, None)))
        self._is_direct = all(self._stored(name, 0) is not None for name in self._parts)

    def form(self, expert: int) -> object:
        return None

    def num_bytes(self, expert: int) -> int:
        return self._num_bytes

    def ranges(self, expert: int, memory: Tensor) -> list[Range] | None:
        if not self._is_direct:
            return None
        made = []
        for name, part in self._parts.items():
            stored, start = self._stored(name, expert), part.start
            assert stored is not None
            for entry, offset, num_bytes in stored:
                made.append(Range(entry.file, offset, memory[start : start + num_bytes]))
                start += num_bytes
        return made

    def fill(self, expert: int, memory: Tensor) -> None:
        read = self._layer.native_expert(expert)
        for tensor, part in zip(read, self._parts.values(), strict=False):
            assert tensor is not None
            part.of(memory).copy_(tensor)

    def tensors(self, expert: int, memory: Tensor, dtype: torch.dtype) -> ExpertTensors:
        up, down, *biases = (part.of(memory) for part in self._parts.values())
        return ExpertTensors(up, down, *(biases or (None, None)))

    def matrices(self, expert: int, memory: Tensor) -> ExpertMatrices | None:
        up, down, up_bias, down_bias = self.tensors(expert, memory, torch.float32)
        turned = [dense_matrix(weight.mT if self._transposed else weight) for weight in (up, down)]
        if turned[0] is None or turned[1] is None:
            return None
        return ExpertMatrices(turned[0], turned[1], up_bias, down_bias)

    def _stored(self, name: str, expert: int) -> list[tuple[TensorEntry, int, int]] | None:
        """The bytes that, one behind the other, are a parameter of an expert; None where there are none."""
        source, part = self._view.sources[name], self._parts[name]
        wanted = torch.Size(part.shape).numel() * part.dtype.itemsize
        if source.converter is None:
            (stored,) = source.names
            entry = self._view.entries.get(stored)
            if entry is None or entry.dtype != part.dtype or entry.shape != (self.num_experts, *part.shape):
                return None
            return [(entry, entry.offset + expert * wanted, wanted)]
        operations = source.converter.operations
        if [type(one).__name__ for one in operations] not in _STACKING or len(source.targets) != 1:
            return None
        if [one.dim for one in operations] != [0, 1][: len(operations)]:
            return None
        names = [n for found in source.expert_names(expert, self.num_experts).values() for n in found]
        entries = [self._view.entries.get(one) for one in names]
        found = [entry for entry in entries if entry is not None and entry.dtype == part.dtype]
        if len(found) != len(names) or sum(entry.num_bytes for entry in found) != wanted:
            return None
        return [(entry, entry.offset, entry.num_bytes) for entry in found]


@final
class Packed(Recipe):
    """Experts in fewer bits, as they are stored."""

    def __init__(
        self,
        view: CheckpointView,
        layer: DiskLayer | PackedLayer,
        record: LayerRecord,
        forms: Sequence[Form],
    ) -> None:
        assert record.experts is not None
        self.num_experts = len(record.experts)
        self._view = view
        self._record = record
        self._transposed = layer.layout.transposed
        self._parts: list[dict[str, Part]] = []
        self._sizes: list[int] = []
        by_name = {form.name: form for form in forms}
        for number in range(self.num_experts):
            parts, total = {}, 0
            for name in record.tensor_names(number):
                form = by_name[name]
                parts[name] = Part(total, form.dtype, form.shape)
                total += _aligned(form.num_bytes)
            self._parts.append(parts)
            self._sizes.append(total)
        self._units = scaled_units(view, layer) if isinstance(layer, DiskLayer) else []
        # Experts that are stored in one form are one record of the kernels, put elsewhere for each.
        self._matrices: dict[tuple[str, int], ExpertMatrices | None] = {}

    def owner(self, expert: int) -> int:
        return self._record.place(expert)

    def form(self, expert: int) -> object:
        assert self._record.experts is not None
        record = self._record.experts[expert]
        return f"{_form(record.up)} {_form(record.down)} {record.has_bias}"

    def num_bytes(self, expert: int) -> int:
        return self._sizes[expert]

    def ranges(self, expert: int, memory: Tensor) -> list[Range] | None:
        parts = self._parts[expert]
        stored = _scaled_places(self._record.name, self._units[expert]) if self._units else None
        made = []
        for name, part in parts.items():
            num_bytes = torch.Size(part.shape).numel() * part.dtype.itemsize
            if not num_bytes:
                continue
            if not self._units:
                entry, offset = self._view.entries[name], self._view.entries[name].offset
            elif stored is not None and name in stored:
                entry, offset = stored[name]
            else:
                return None
            made.append(Range(entry.file, offset, memory[part.start : part.start + num_bytes]))
        return made

    def fill(self, expert: int, memory: Tensor) -> None:
        unit = self._units[expert]
        read = expert_tensors(unit.layer, unit.expert, unit.number, unit.storage)[1]
        for name, part in self._parts[expert].items():
            part.of(memory).copy_(read[name])

    def tensors(self, expert: int, memory: Tensor, dtype: torch.dtype) -> ExpertTensors:
        parts = self._parts[expert]
        read = read_expert(self._record, expert, lambda name: parts[name].of(memory))
        return read.native(dtype, transposed=self._transposed)

    def matrices(self, expert: int, memory: Tensor) -> ExpertMatrices | None:
        assert self._record.experts is not None
        parts = self._parts[expert]
        key = str(self.form(expert)), memory.data_ptr()
        if key not in self._matrices:
            read = read_expert(self._record, expert, lambda name: parts[name].of(memory))
            self._matrices[key] = read.matrices()
        return self._matrices[key]


def _form(record: MatrixRecord) -> str:
    return json.dumps(record.to_dict(), sort_keys=True)


def _scaled_places(layer: str, unit: PackExpert) -> Mapping[str, tuple[TensorEntry, int]] | None:
    """Where the values and scales of an expert in its source's own format are, by the names they get."""
    if not isinstance(unit.storage, AsStored):
        return None
    found = {}
    for matrix in MATRICES:
        for number, piece in enumerate(unit.storage.pieces[matrix]):
            for part, entries in ((values_part(number), piece.values), (scales_part(number), piece.scales)):
                entry, start = entries[0 if piece.fused else unit.expert], 0
                if piece.fused:
                    start = unit.expert * (entry.num_bytes // entry.shape[0])
                found[part_name(layer, unit.number, matrix, part)] = entry, entry.offset + start
    return found


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
