"""How a checkpoint of the mixtura format names and describes what it stores in fewer bits.

`mixtura.checkpoints.apply` writes by these records; `mixtura.load` and `mixtura.running.stream` read by
them. An ordinary checkpoint has no ``experts.json``; one of the mixtura format has, beside the tensors:

* ``config.json`` with ``"quantization_config": {"quant_method": "mixtura", "version": 1}`` (and the
  source's own quantization under ``"source"``, which still holds for tensors outside the experts),
* ``experts.json``: for every MoE layer the experts it kept and, where the layer is packed, how each
  matrix of each expert is stored; where experts were merged, ``shared`` names for each expert the one
  whose tensors it has, so that the router still chooses among all of them; and how matrices outside the
  experts are stored that are in fewer bits,
* tensors ``{layer}.{e}.up.{part}``, ``{layer}.{e}.down.{part}``, ``{layer}.{e}.up_bias`` and
  ``{layer}.{e}.down_bias``, where ``layer`` is the module path of the experts, ``e`` counts after
  any drop, and a matrix is ``[out features, in features]`` in the row order of its module,
* tensors ``{tensor}.{part}`` in the place of a matrix outside the experts that is in fewer bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.viewing.formats import decode_fp8, decode_mxfp4
from mixtura.errors import CheckpointError
from mixtura.kernels import (
    ExpertMatrices,
    ExpertTensors,
    Matrix,
    dense_matrix,
    stored_matrix,
)
from mixtura.methods import create
from mixtura.methods.quantizers import Encoded, Quantizer

QUANT_METHOD = "mixtura"
EXPERTS_FILE = "experts.json"
PLAN_FILE = "plan.json"

MatrixName = Literal["up", "down"]
MATRICES: tuple[MatrixName, MatrixName] = ("up", "down")
DENSE_PART = "weight"
STORED_KINDS = ("fp8", "mxfp4")


@final
@dataclass(frozen=True, slots=True)
class MatrixRecord:
    """How one matrix of one expert is stored.

    Attributes:
        rows: output features.
        cols: input features.
        dtype: name of the floating dtype the matrix has when decoded, such as ``bfloat16``.
        parts: names of its tensors, sorted; ``("weight",)`` for a matrix stored dense.
        quantizer: name of the quantizer, or None for a matrix stored as its source has it.
        settings: the quantizer's settings.
        meta: what the quantizer's ``decode`` needs beside the tensors. A matrix that its source
            stores in FP8 or MXFP4 stays so: ``{"stored": "fp8", "pieces": 2, "block": [128, 128]}``.
    """

    rows: int
    cols: int
    dtype: str
    parts: tuple[str, ...] = (DENSE_PART,)
    quantizer: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch names it."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(
                f"{EXPERTS_FILE} names the unknown dtype {self.dtype!r}; write the model again"
            )
        return found

    @property
    def widths(self) -> dict[int, tuple[str, ...]]:
        """Bits the matrix can be read at and the parts that each reads; empty where it is read whole."""
        if self.quantizer is None:
            return {}
        widths = quantizer_of(self).widths.items()
        return {bits: parts for bits, parts in widths if set(parts) <= set(self.parts)}

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {
            "rows": self.rows,
            "cols": self.cols,
            "dtype": self.dtype,
            "parts": list(self.parts),
            "quantizer": self.quantizer,
            "settings": dict(self.settings),
            "meta": dict(self.meta),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MatrixRecord:
        """The record that `to_dict` wrote."""
        return MatrixRecord(
            rows=int(values["rows"]),
            cols=int(values["cols"]),
            dtype=str(values["dtype"]),
            parts=tuple(values["parts"]),
            quantizer=values["quantizer"],
            settings=dict(values["settings"]),
            meta=dict(values["meta"]),
        )


@final
@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """How one expert is stored: its two matrices and whether they have biases."""

    up: MatrixRecord
    down: MatrixRecord
    has_bias: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {"up": self.up.to_dict(), "down": self.down.to_dict(), "has_bias": self.has_bias}

    def matrix(self, name: MatrixName) -> MatrixRecord:
        """The record of ``up`` or ``down``."""
        return self.up if name == "up" else self.down

    def tensor_names(self, layer: str, expert: int) -> tuple[str, ...]:
        """On-disk names of every tensor of this expert, in the order they are written."""
        names = [
            part_name(layer, expert, matrix, part)
            for matrix in MATRICES
            for part in self.matrix(matrix).parts
        ]
        if self.has_bias:
            names += [bias_name(layer, expert, matrix) for matrix in MATRICES]
        return tuple(names)


@final
@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What a checkpoint of the mixtura format holds of one MoE layer.

    Attributes:
        index: number of the decoder layer.
        name: module path of the layer's experts.
        kept: the source's numbers of the experts that are left, ascending.
        experts: one record per expert left, or None where the layer's experts are stored under the
            source's own names and in its own way (renumbered or sliced where some were dropped).
        shared: where experts were merged, for each expert the number of the one whose tensors it has; a
            router still chooses them apart. None where each has its own.
    """

    index: int
    name: str
    kept: tuple[int, ...]
    experts: tuple[ExpertRecord, ...] | None = None
    shared: tuple[int, ...] | None = None

    @property
    def num_experts(self) -> int:
        """Experts that are left in this layer for its router to choose from."""
        return len(self.kept)

    @property
    def stored(self) -> tuple[int, ...]:
        """The experts that have tensors of their own."""
        return tuple(range(self.num_experts)) if self.shared is None else tuple(sorted(set(self.shared)))

    def place(self, expert: int) -> int:
        """The expert whose tensors it has."""
        return expert if self.shared is None else self.shared[expert]

    def tensor_names(self, expert: int) -> tuple[str, ...]:
        """On-disk names of an expert's tensors, in a packed layer."""
        assert self.experts is not None
        return self.experts[expert].tensor_names(self.name, self.place(expert))


@final
@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix as stored: its record and its tensors by part."""

    record: MatrixRecord
    tensors: Mapping[str, Tensor]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "R C"]:
        """The matrix ``[out features, in features]`` in `dtype`."""
        record = self.record
        if "stored" in record.meta:
            return self._dense_from_stored().to(dtype)
        if record.quantizer is None:
            return self.tensors[DENSE_PART].to(dtype)
        encoded = Encoded(dict(self.tensors), dict(record.meta))
        return quantizer_of(record).decode(encoded, dtype)

    def native(self) -> Matrix | None:
        """The matrix for the compiled kernels, in place; None where they do not know how it is stored."""
        record = self.record
        if "stored" in record.meta:
            return None
        if record.quantizer is None:
            return dense_matrix(self.tensors[DENSE_PART])
        return stored_matrix(quantizer_of(record), self.tensors, rows=record.rows, cols=record.cols)

    def _dense_from_stored(self) -> Float[Tensor, "R C"]:
        """The matrix from the values and scales of its source, in the dtype the source is decoded to."""
        record = self.record
        dense = []
        for number in range(record.meta["pieces"]):
            values, scales = self.tensors[values_part(number)], self.tensors[scales_part(number)]
            if record.meta["stored"] == "mxfp4":
                dense.append(decode_mxfp4(values[None], scales[None], record.torch_dtype)[0].T)
            else:
                block = record.meta["block"]
                size = None if block is None else (int(block[0]), int(block[1]))
                dense.append(decode_fp8(values, scales, record.torch_dtype, size))
        return torch.cat(dense) if len(dense) > 1 else dense[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@final
@dataclass(frozen=True, slots=True)
class PackedExpert:
    """One expert as stored; `native` gives it back ready to multiply."""

    up: PackedMatrix
    down: PackedMatrix
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        biases = [bias for bias in (self.up_bias, self.down_bias) if bias is not None]
        return self.up.num_bytes + self.down.num_bytes + sum(b.numel() * b.element_size() for b in biases)

    def matrices(self) -> ExpertMatrices | None:
        """The expert for the compiled kernels, in place; None where they do not know how it is stored."""
        up, down = self.up.native(), self.down.native()
        return None if up is None or down is None else ExpertMatrices(up, down, self.up_bias, self.down_bias)

    def native(self, dtype: torch.dtype, *, transposed: bool) -> ExpertTensors:
        """The expert dense, in the layout of its module.

        Args:
            dtype: dtype of the result.
            transposed: whether the module stores ``[in, out]``; the result is then a transposed view.
        """
        up, down = self.up.dense(dtype), self.down.dense(dtype)
        if transposed:
            up, down = up.T, down.T
        up_bias = None if self.up_bias is None else self.up_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return ExpertTensors(up, down, up_bias, down_bias)


def part_name(layer: str, expert: int, matrix: MatrixName, part: str) -> str:
    """On-disk name of one tensor of one matrix.

    >>> part_name("model.layers.0.mlp.experts", 3, "up", "codes")
    'model.layers.0.mlp.experts.3.up.codes'
    """
    return f"{layer}.{expert}.{matrix}.{part}"


def values_part(piece: int) -> str:
    """Part name of the values of a matrix kept in its source's FP8 or MXFP4; rows come in pieces."""
    return f"values{piece}"


def scales_part(piece: int) -> str:
    """Part name of the scales that belong to `values_part` of the same piece."""
    return f"scales{piece}"


def bias_name(layer: str, expert: int, matrix: MatrixName) -> str:
    """On-disk name of one bias.

    >>> bias_name("model.layers.0.mlp.experts", 3, "down")
    'model.layers.0.mlp.experts.3.down_bias'
    """
    return f"{layer}.{expert}.{matrix}_bias"


def read_expert(layer: LayerRecord, expert: int, read_tensor: Callable[[str], Tensor]) -> PackedExpert:
    """One expert of a packed layer as stored.

    Args:
        layer: one that is packed.
        expert: its number after any drop.
        read_tensor: gives the tensor of an on-disk name, such as `DiskView.tensor`.
    """
    if layer.experts is None:
        raise CheckpointError(
            f"{layer.name} is stored in the source's own way; read it through mixtura.checkpoints.view"
        )
    record, place, packed = layer.experts[expert], layer.place(expert), {}
    for matrix in MATRICES:
        described = record.matrix(matrix)
        tensors = {part: read_tensor(part_name(layer.name, place, matrix, part)) for part in described.parts}
        packed[matrix] = PackedMatrix(described, tensors)
    names = [bias_name(layer.name, place, matrix) for matrix in MATRICES] if record.has_bias else []
    return PackedExpert(packed["up"], packed["down"], *map(read_tensor, names))


def is_packed(directory: Path) -> bool:
    """Whether a checkpoint directory is of the mixtura format."""
    return (directory / EXPERTS_FILE).is_file()


def quantizer_of(record: MatrixRecord) -> Quantizer:
    """The quantizer that wrote a matrix."""
    return _quantizer(str(record.quantizer), json.dumps(dict(record.settings), sort_keys=True))


@cache
def _quantizer(name: str, settings: str) -> Quantizer:
    # Kept, because a model decodes experts for every token and finding a method reads its file.
    quantizer = create("quantizers", name, **json.loads(settings))
    assert isinstance(quantizer, Quantizer)
    return quantizer


def matrix_part(tensor: str, part: str) -> str:
    """On-disk name of one part of a matrix outside the experts.

    >>> matrix_part("lm_head.weight", "codes")
    'lm_head.weight.codes'
    """
    return f"{tensor}.{part}"
