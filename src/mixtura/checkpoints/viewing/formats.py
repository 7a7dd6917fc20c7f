"""Stored number formats that are decoded one expert at a time: block-scaled FP8 and MXFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mixtura.checkpoints.viewing.headers import TensorEntry, TensorFiles
from mixtura.errors import CheckpointError

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
_MX_BLOCKS, _MX_SCALES = "_blocks", "_scales"
_MX_BIAS = 127
# The 16 values of 4-bit floating point (1 sign, 2 exponent, 1 mantissa bit), by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor of a checkpoint: one entry, or the two of a scaled format.

    ``shape`` is that of the decoded tensor. ``parts`` are the names on disk.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    num_bytes: int


def stored_tensors(entries: dict[str, TensorEntry]) -> dict[str, StoredTensor]:
    """Logical tensors of a checkpoint: FP8 weights with their scales, MXFP4 blocks with theirs.

    Raises `CheckpointError` for FP8 weights without scales.
    """
    result: dict[str, StoredTensor] = {}
    companions: set[str] = set()
    for name, entry in entries.items():
        if entry.dtype in _FP8:
            scale = _scale_name(name, entries)
            if scale is None:
                raise CheckpointError(
                    f"{name} is stored as FP8 without {name}{_SCALE_SUFFIXES[0]}, so it cannot be "
                    "decoded; use a checkpoint with its scales or one in bfloat16"
                )
            companions.add(scale)
            num_bytes = entry.num_bytes + entries[scale].num_bytes
            result[name] = StoredTensor(name, (name, scale), entry.shape, "fp8", num_bytes)
        elif name.endswith(_MX_BLOCKS) and name.removesuffix(_MX_BLOCKS) + _MX_SCALES in entries:
            base = name.removesuffix(_MX_BLOCKS)
            scale = base + _MX_SCALES
            companions.add(scale)
            experts, rows, blocks, half = entry.shape
            num_bytes = entry.num_bytes + entries[scale].num_bytes
            shape = (experts, blocks * half * 2, rows)
            result[base] = StoredTensor(base, (name, scale), shape, "mxfp4", num_bytes)
        else:
            kind = str(entry.dtype).removeprefix("torch.")
            result[name] = StoredTensor(name, (name,), entry.shape, kind, entry.num_bytes)
    return {name: tensor for name, tensor in result.items() if name not in companions}


def _scale_name(name: str, entries: dict[str, TensorEntry]) -> str | None:
    """The name under which a checkpoint keeps the scales of an FP8 tensor."""
    for suffix in _SCALE_SUFFIXES:
        if name + suffix in entries:
            return name + suffix
    beside = f"{name.removesuffix('.weight')}.scale"
    return beside if beside in entries else None


@final
class Decoder:
    """Reads logical tensors of a checkpoint, decoding scaled formats to one dtype.

    ``fp8_block`` is the block size the config states, ``None`` where it states none.
    """

    def __init__(self, files: TensorFiles, dtype: torch.dtype, fp8_block: tuple[int, int] | None) -> None:
        self._files = files
        self._dtype = dtype
        self._fp8_block = fp8_block

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> Tensor:
        """The tensor, or a slice of its first axis; nothing else is read from disk."""
        if tensor.kind == "fp8":
            return self._read_fp8(tensor, rows)
        parts = [self._files.read(part, rows) for part in tensor.parts]
        return decode_mxfp4(parts[0], parts[1], self._dtype) if tensor.kind == "mxfp4" else parts[0]

    def _read_fp8(self, tensor: StoredTensor, rows: slice | None) -> Tensor:
        weight_name, scale_name = tensor.parts
        if len(tensor.shape) < 3 and rows is not None:
            # Rows of one matrix may share a scale; only matrices of a stack have scales of their own.
            return self._read_fp8(tensor, None)[rows]
        per_matrix = len(self._files.entries[scale_name].shape) == len(tensor.shape)
        scale = self._files.read(scale_name, rows if per_matrix else None)
        return decode_fp8(self._files.read(weight_name, rows), scale, self._dtype, self._fp8_block)


def decode_fp8(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] | None = None
) -> Tensor:
    """Multiply each ``block`` (rows, columns) of an FP8 tensor by its scale.

    The last block of an axis may be cut off. Without ``block`` it is what divides the tensor into as
    many pieces as there are scales. Scales stored as bytes are powers of two.
    """
    factor = (scale.to(torch.float32) - _MX_BIAS).exp2() if scale.dtype == torch.uint8 else scale.float()
    if factor.numel() == 1 or weight.ndim < 2:
        return (weight.to(torch.float32) * factor).reshape(weight.shape).to(dtype)
    rows, columns = weight.shape[-2:]
    tall = _block_length(rows, factor.shape[-2], block, 0)
    wide = _block_length(columns, factor.shape[-1], block, 1)
    result = torch.empty(weight.shape, dtype=dtype)
    # A strip of blocks at a time: the float32 intermediate stays small beside the result.
    for i in range(factor.shape[-2]):
        strip = slice(i * tall, (i + 1) * tall)
        per_column = factor[..., i, :].repeat_interleave(wide, dim=-1)[..., :columns].unsqueeze(-2)
        result[..., strip, :] = weight[..., strip, :].to(torch.float32) * per_column
    return result


def _block_length(size: int, count: int, block: tuple[int, int] | None, axis: int) -> int:
    """Length of the ``count`` blocks of an axis: the stated one where it fits, else an even division."""
    if block is not None and -(-size // block[axis]) == count:
        return block[axis]
    return -(-size // count)


def decode_mxfp4(
    blocks: UInt8[Tensor, "E rows num_blocks half"],
    scales: UInt8[Tensor, "E rows num_blocks"],
    dtype: torch.dtype,
) -> Float[Tensor, "E cols rows"]:
    """Decode MXFP4: 32 four-bit floats to a block, two to a byte (low half first), one exponent a block.

    The result is transposed to ``[E, in, out]``, the layout in which gpt-oss multiplies.
    """
    table = torch.tensor(_E2M1, dtype=torch.float32)
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1)
    exponent = scales.to(torch.int32) - _MX_BIAS
    values = torch.ldexp(table[codes.long()].flatten(-2), exponent.unsqueeze(-1))
    return values.flatten(-2).transpose(-1, -2).contiguous().to(dtype)
