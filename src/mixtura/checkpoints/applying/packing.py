"""Units that write one expert of the mixtura format: read it, encode its matrices, write their parts."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.applying.copying import Watch, damaged, read_range
from mixtura.checkpoints.applying.merging import merged_expert
from mixtura.checkpoints.applying.shards import OutputTensor, Sink, Unit
from mixtura.checkpoints.packed import (
    DENSE_PART,
    MATRICES,
    STORED_KINDS,
    ExpertRecord,
    MatrixName,
    MatrixRecord,
    PackedMatrix,
    bias_name,
    part_name,
    scales_part,
    values_part,
)
from mixtura.checkpoints.rounded import RoundedExperts
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.headers import TensorEntry
from mixtura.checkpoints.viewing.quantization import fp8_block
from mixtura.errors import UserError
from mixtura.methods import create
from mixtura.methods.quantizers import Quantizer
from mixtura.types import Merge, Quantize


class Storage(ABC):
    """A way to store one matrix of an expert."""

    @abstractmethod
    def store(
        self, expert: int, matrix: MatrixName, weight: Float[Tensor, "R C"]
    ) -> tuple[MatrixRecord, dict[str, Tensor]]:
        """The record and tensors of a matrix.

        Args:
            expert: the source's number of the expert.
            matrix: which of its matrices.
            weight: the matrix, ``[out features, in features]``.
        """


@final
class Dense(Storage):
    """As it is, in its own dtype."""

    def store(
        self, expert: int, matrix: MatrixName, weight: Float[Tensor, "R C"]
    ) -> tuple[MatrixRecord, dict[str, Tensor]]:
        """The matrix itself."""
        del expert, matrix
        return _record(weight, (DENSE_PART,)), {DENSE_PART: weight}


@final
class Encoding(Storage):
    """By a quantizer, or as it was rounded before."""

    def __init__(self, action: Quantize, rounded: RoundedExperts | None = None) -> None:
        quantizer = create("quantizers", action.quantizer, **action.settings)
        assert isinstance(quantizer, Quantizer)
        self._quantizer = quantizer
        self._action = action
        self._rounded = rounded

    def store(
        self, expert: int, matrix: MatrixName, weight: Float[Tensor, "R C"]
    ) -> tuple[MatrixRecord, dict[str, Tensor]]:
        """The matrix in fewer bits."""
        encoded = None
        if self._rounded is not None:
            encoded = self._rounded.matrix(replace(self._action, expert=expert), matrix)
        if encoded is None:
            encoded = self._quantizer.encode(weight)
        record = _record(
            weight,
            tuple(encoded.tensors),
            quantizer=self._action.quantizer,
            settings=dict(self._action.settings),
            meta=dict(encoded.meta),
        )
        return record, encoded.tensors


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a matrix as stored: for each expert the entries of its values and its scales.

    ``fused``: all experts share one entry, and each has one row of its first axis.
    """

    values: tuple[TensorEntry, ...]
    scales: tuple[TensorEntry, ...]
    fused: bool

    def read(self, expert: int, layer: int) -> tuple[Tensor, Tensor]:
        """Values and scales of one expert.

        Raises:
            CheckpointError: a scale is NaN or infinite.
        """
        place = 0 if self.fused else expert
        values = self._read(self.values[place], expert)
        scales = self._read(self.scales[place], expert)
        exponents = scales.dtype == torch.uint8
        Watch(layer, "expert", exponents=exponents).check(self.scales[place], scales, expert)
        return values, scales

    def _read(self, entry: TensorEntry, expert: int) -> Tensor:
        shape, start, num_bytes = entry.shape, 0, entry.num_bytes
        if self.fused:
            num_bytes //= shape[0]
            start, shape = expert * num_bytes, shape[1:]
        return read_range(entry, start, num_bytes).view(entry.dtype).reshape(shape)


@final
@dataclass(frozen=True, slots=True)
class AsStored(Storage):
    """As the source stores it in FP8 or MXFP4: values and scales, copied.

    ``pieces``: for each matrix the stored tensors that make up its rows, one after the other.
    """

    layer: int
    kind: str
    block: list[int] | None
    pieces: Mapping[MatrixName, tuple[Piece, ...]]

    def store(
        self, expert: int, matrix: MatrixName, weight: Float[Tensor, "R C"]
    ) -> tuple[MatrixRecord, dict[str, Tensor]]:
        """The values and scales of an expert's matrix."""
        tensors: dict[str, Tensor] = {}
        for number, piece in enumerate(self.pieces[matrix]):
            tensors[values_part(number)], tensors[scales_part(number)] = piece.read(expert, self.layer)
        meta = {"stored": self.kind, "pieces": len(self.pieces[matrix]), "block": self.block}
        return _record(weight, tuple(tensors), meta=meta), tensors


@final
@dataclass(frozen=True, eq=False)
class PackExpert(Unit):
    """Writes all tensors of one expert in the mixtura format."""

    layer: DiskLayer
    expert: int
    number: int
    storage: Storage
    record: ExpertRecord
    outputs: tuple[OutputTensor, ...]
    merge: Merge | None = None

    @property
    def tensors(self) -> tuple[OutputTensor, ...]:
        """Parts of both matrices, then the biases."""
        return self.outputs

    def write(self, sink: Sink) -> None:
        """Read the expert, encode it, write it."""
        record, tensors = expert_tensors(self.layer, self.expert, self.number, self.storage, self.merge)
        forms = {OutputTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        if record != self.record or forms != set(self.outputs):
            raise UserError(
                f"expert {self.expert} of layer {self.layer.index} is stored in another form by "
                f"{record.up.quantizer or 'its source'} than the first expert of the layer; what differs "
                f"between matrices of one shape must be in the values of an encoding's tensors"
            )
        for name, tensor in tensors.items():
            sink.write(name, tensor)


def packed_units(
    view: DiskView,
    layer: DiskLayer,
    kept: tuple[int, ...],
    actions: Mapping[int, Quantize],
    rounded: RoundedExperts | None = None,
    merges: Sequence[Merge] = (),
) -> list[PackExpert]:
    """One unit for each expert of a packed layer that is kept and stored; of merged ones, for the first.

    One expert is read here for each way of storing, to learn what it takes.

    Args:
        view: the source.
        layer: one of its layers.
        kept: the source's numbers of the experts that stay, ascending.
        actions: how experts are quantized, by the source's number; the others stay as they are.
        rounded: experts that need not be rounded any more.
        merges: groups of the layer's experts that become one.
    """
    first = {merge.experts[0]: merge for merge in merges}
    others = {expert for merge in merges for expert in merge.experts[1:]}
    storages: dict[str, Storage] = {}
    samples: dict[str, tuple[ExpertRecord, dict[str, Tensor]]] = {}
    units = []
    for number, expert in enumerate(kept):
        if expert in others:
            continue
        action = actions.get(expert)
        key = "" if action is None else action.quantizer + json.dumps(action.settings, sort_keys=True)
        if action is None and expert in first:
            key = "average"
        if key not in storages:
            storages[key] = Dense() if key == "average" else _storage(view, layer, kept[0], action, rounded)
            samples[key] = expert_tensors(layer, kept[0], 0, storages[key])
        record, sample = samples[key]
        names = zip(record.tensor_names(layer.name, 0), record.tensor_names(layer.name, number), strict=True)
        outputs = tuple(OutputTensor(new, sample[old].dtype, tuple(sample[old].shape)) for old, new in names)
        units.append(PackExpert(layer, expert, number, storages[key], record, outputs, first.get(expert)))
    return units


def _storage(
    view: DiskView, layer: DiskLayer, sample: int, action: Quantize | None, rounded: RoundedExperts | None
) -> Storage:
    return _unchanged(view, layer, sample) if action is None else Encoding(action, rounded)


def expert_tensors(
    layer: DiskLayer, expert: int, number: int, storage: Storage, merge: Merge | None = None
) -> tuple[ExpertRecord, dict[str, Tensor]]:
    """The record of an expert stored in some way, and its tensors under their names on disk.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    native = layer.native_expert(expert) if merge is None else merged_expert(layer, merge)
    records, tensors = {}, {}
    for matrix, weight in zip(MATRICES, (native.up, native.down), strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise damaged(f"{layer.name}, its {matrix} projection", layer.index, expert, "expert")
        turned = weight.T.contiguous() if layer.layout.transposed else weight
        records[matrix], parts = storage.store(expert, matrix, turned)
        tensors.update({part_name(layer.name, number, matrix, part): t for part, t in parts.items()})
    for matrix, bias in zip(MATRICES, (native.up_bias, native.down_bias), strict=True):
        if bias is not None:
            if not bool(torch.isfinite(bias).all()):
                raise damaged(f"{layer.name}, its {matrix} bias", layer.index, expert, "expert")
            tensors[bias_name(layer.name, number, matrix)] = bias
    return ExpertRecord(records["up"], records["down"], native.up_bias is not None), tensors


def _unchanged(view: DiskView, layer: DiskLayer, sample: int) -> Storage:
    """How experts that no action names are stored: in FP8 or MXFP4 where the source has them so."""
    matrices = dict(zip(MATRICES, layer.expert_parameters, strict=False))
    found = {matrix: _pieces(view, layer, name) for matrix, name in matrices.items()}
    kinds = {kind for kind, _ in found.values()}
    kind = kinds.pop()
    if kinds or kind not in STORED_KINDS:
        return Dense()
    block = fp8_block(view.raw_config)
    storage = AsStored(
        layer.index,
        kind,
        None if block is None else list(block),
        {matrix: pieces for matrix, (_, pieces) in found.items()},
    )
    # A family may put pieces together in another way than one after the other; then values go first.
    native = layer.native_expert(sample)
    for matrix, weight in zip(MATRICES, (native.up, native.down), strict=True):
        turned = weight.T if layer.layout.transposed else weight
        packed = PackedMatrix(*storage.store(sample, matrix, turned))
        if not torch.equal(packed.dense(weight.dtype), turned):
            return Dense()
    return storage


def _pieces(view: DiskView, layer: DiskLayer, parameter: str) -> tuple[str, tuple[Piece, ...]]:
    """How the stored tensors of a parameter are kept (``mixed`` if not all alike), and what they are."""
    source = view.sources[parameter]
    share = source.targets.index(parameter) if source.per_expert else 0
    pieces = []
    kinds: set[str] = set()
    for pattern, names in source.parts.items():
        fused = "*" not in pattern
        own = names if fused else names[share * layer.num_experts : (share + 1) * layer.num_experts]
        stored = [view.stored[name] for name in own]
        kinds.update(tensor.kind for tensor in stored)
        entries = [tuple(view.entries[part] for part in tensor.parts) for tensor in stored]
        pieces.append(Piece(tuple(e[0] for e in entries), tuple(e[-1] for e in entries), fused))
    return kinds.pop() if len(kinds) == 1 else "mixed", tuple(pieces)


def _record(weight: Tensor, parts: tuple[str, ...], **fields: Any) -> MatrixRecord:
    rows, cols = weight.shape
    dtype = str(weight.dtype).removeprefix("torch.")
    return MatrixRecord(rows, cols, dtype, tuple(sorted(parts)), **fields)
