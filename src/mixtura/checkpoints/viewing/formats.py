"""Stored number formats that are decoded one expert at a time: block-scaled FP8 and MXFP4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NoReturn, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers.utils.quantization_config import FineGrainedFP8Config

from mixtura.checkpoints.viewing.headers import TensorEntry, TensorFiles
from mixtura.checkpoints.viewing.refusals import READABLE_FORMATS
from mixtura.errors import CheckpointError, UnsupportedModelError

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_SCALE_SUFFIXES = ("_scale_inv", "_scale")
# How other checkpoints call the scale of a ``weight``, in its place.
_BESIDE_SUFFIXES = (".scale", ".qscale_weight")
_MX_BLOCKS, _MX_SCALES = "_blocks", "_scales"
_MX_BIAS = 127
# How a second scale of NVFP4, of a whole matrix, is called beside the scales of its blocks.
_SECOND_SUFFIX = "_scale_2"
_PACKED_DTYPES = (torch.int8, torch.uint8)
# The 16 values of 4-bit floating point (1 sign, 2 exponent, 1 mantissa bit), by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@final
@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A logical tensor of a checkpoint: one entry, or the two of a scaled format.

    ``shape`` is that of the decoded tensor. ``parts`` are the names on disk. ``unread`` says what the
    format is where it cannot be decoded, which matters only if the model needs the tensor. ``decode`` makes
    the tensor of its parts, where these are in mixtura's own format.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    num_bytes: int
    unread: str | None = None
    decode: Callable[[Mapping[str, Tensor]], Tensor] | None = None


def stored_tensors(entries: Mapping[str, TensorEntry]) -> dict[str, StoredTensor]:
    """Logical tensors of a checkpoint: FP8 weights with their scales, MXFP4 blocks with theirs.

    Those in formats that are not read are among them, marked by ``unread``.
    """
    result: dict[str, StoredTensor] = {}
    companions: set[str] = set()
    for name, entry in entries.items():
        found = _scaled(name, entry, entries)
        if found is None:
            kind = entry.foreign or str(entry.dtype).removeprefix("torch.")
            found = StoredTensor(name, (name,), entry.shape, kind, entry.num_bytes, entry.foreign)
        companions.update(part for part in found.parts if part != name)
        result[found.name] = found
    return {name: tensor for name, tensor in result.items() if name not in companions}


def _scaled(name: str, entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> StoredTensor | None:
    """The tensor in a scaled format whose values an entry holds; `None` for plain ones and for scales."""
    if name.endswith(_MX_BLOCKS) and name.removesuffix(_MX_BLOCKS) + _MX_SCALES in entries:
        return _mxfp4(name, entry, entries)
    if entry.dtype not in (*_FP8, *_PACKED_DTYPES) or _is_scale(name, entries):
        return None
    scale = _scale_name(name, entries)
    if scale is None:
        if entry.dtype not in _FP8:
            return None
        unread = f"FP8 without {name}{_SCALE_SUFFIXES[0]}"
        return StoredTensor(name, (name,), entry.shape, "fp8", entry.num_bytes, unread)
    second = name + _SECOND_SUFFIX
    parts = (name, scale, second) if second in entries else (name, scale)
    num_bytes = sum(entries[part].num_bytes for part in parts)
    if entry.dtype in _FP8:
        two = "FP8 with two kinds of scales" if second in entries else None
        return StoredTensor(name, parts, entry.shape, "fp8", num_bytes, two)
    kind = _packed_name(entry, entries[scale], second in entries)
    return StoredTensor(name, parts, entry.shape, kind, num_bytes, kind)


def _packed_name(entry: TensorEntry, scale: TensorEntry, has_second: bool) -> str:
    """What people call integers, or values of a foreign type, that have scales beside them."""
    if has_second:
        return "NVFP4"
    if entry.foreign is not None:
        return entry.foreign
    exponents = scale.dtype in (torch.float8_e8m0fnu, torch.uint8)
    whole = str(entry.dtype).removeprefix("torch.")
    return "FP4, two values to a byte" if exponents else f"{whole} with scales"


def _mxfp4(name: str, entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> StoredTensor:
    base = name.removesuffix(_MX_BLOCKS)
    scale = base + _MX_SCALES
    num_bytes = entry.num_bytes + entries[scale].num_bytes
    if entry.dtype != torch.uint8 or len(entry.shape) != 4 or entries[scale].shape != entry.shape[:-1]:
        unread = f"blocks {list(entry.shape)} and scales {list(entries[scale].shape)}, which are not MXFP4's"
        return StoredTensor(base, (name, scale), entry.shape, "blocks", num_bytes, unread)
    experts, rows, blocks, half = entry.shape
    shape = (experts, blocks * half * 2, rows)
    return StoredTensor(base, (name, scale), shape, "mxfp4", num_bytes)


def _is_scale(name: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether an entry is the scale of another."""
    base = next((name.removesuffix(end) for end in _SCALE_SUFFIXES if name.endswith(end)), None)
    if base is not None and base in entries:
        return True
    return any(
        name.endswith(end) and f"{name.removesuffix(end)}.weight" in entries for end in _BESIDE_SUFFIXES
    )


def _scale_name(name: str, entries: Mapping[str, TensorEntry]) -> str | None:
    """The name under which a checkpoint keeps the scales of a tensor."""
    for suffix in _SCALE_SUFFIXES:
        if name + suffix in entries:
            return name + suffix
    base = name.removesuffix(".weight")
    return next((base + end for end in _BESIDE_SUFFIXES if base + end in entries), None)


@final
class Decoder:
    """Reads logical tensors of a checkpoint, decoding scaled formats to one dtype.

    ``fp8_block`` is the block size the config states, ``None`` where it states none.
    """

    def __init__(self, files: TensorFiles, dtype: torch.dtype, fp8_block: tuple[int, int] | None) -> None:
        self._files = files
        self._dtype = dtype
        self._fp8_block = fp8_block

    def check(self, tensor: StoredTensor, stated: str | None = None) -> None:
        """Raise where a tensor that is needed cannot be decoded, saying which format it is in.

        Args:
            tensor: one of `stored_tensors`.
            stated: what the checkpoint itself calls a format that is not read.

        Raises:
            CheckpointError: its scales are missing, or it does not follow from their shape which values
                each of them is of.
            UnsupportedModelError: it is in a format that is not read.
        """
        if tensor.kind == "fp8" and len(tensor.parts) == 1:
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.unread}, so it cannot be decoded; use a checkpoint with "
                "its scales or one in bfloat16"
            )
        if tensor.unread is not None:
            self.refuse(tensor, stated or tensor.unread)
        if tensor.kind != "fp8":
            return
        block, scale = self._fp8_block, self._files.entries[tensor.parts[1]].shape
        if fp8_blocks(tensor.shape, scale, block) is None:
            found = "no weight_block_size" if block is None else f"the weight_block_size {list(block)}"
            raise CheckpointError(
                f"{tensor.name} has shape {list(tensor.shape)} and scales of shape {list(scale)}, and "
                f"config.json states {found}, from which it does not follow what each scale is of; state the "
                "right weight_block_size in its quantization_config"
            )

    def refuse(self, tensor: StoredTensor, name: str) -> NoReturn:
        """Raise `UnsupportedModelError` for a tensor in a format of this name."""
        raise UnsupportedModelError(
            f"{tensor.name} is stored as {name}, which mixtura does not read; use the original checkpoint "
            f"({READABLE_FORMATS} are read)"
        )

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> Tensor:
        """The tensor, or a slice of its first axis; nothing else is read from disk."""
        if tensor.kind == "fp8":
            return self._read_fp8(tensor, rows)
        if tensor.decode is not None:
            whole = tensor.decode({part: self._files.read(part) for part in tensor.parts})
            return whole if rows is None else whole[rows]
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
    """Multiply each block (rows, columns) of an FP8 tensor by its scale.

    The last block of an axis may be cut off. How long blocks are, `fp8_blocks` says. Scales stored as
    bytes are powers of two.

    Raises:
        CheckpointError: it does not follow which values each scale is of.
    """
    factor = (scale.to(torch.float32) - _MX_BIAS).exp2() if scale.dtype == torch.uint8 else scale.float()
    if factor.numel() == 1:
        return (weight.to(torch.float32) * factor).reshape(weight.shape).to(dtype)
    lengths = fp8_blocks(tuple(weight.shape), tuple(scale.shape), block)
    if lengths is None:
        raise CheckpointError(
            f"scales of shape {list(scale.shape)} do not say which values of a matrix of shape "
            f"{list(weight.shape)} they are of; give weight_block_size in config.json's quantization_config"
        )
    tall, wide = lengths
    columns = weight.shape[-1]
    result = torch.empty(weight.shape, dtype=dtype)
    # A strip of blocks at a time: the float32 intermediate stays small beside the result.
    for i in range(factor.shape[-2]):
        strip = slice(i * tall, (i + 1) * tall)
        per_column = factor[..., i, :].repeat_interleave(wide, dim=-1)[..., :columns].unsqueeze(-2)
        result[..., strip, :] = weight[..., strip, :].to(torch.float32) * per_column
    return result


def fp8_blocks(
    shape: tuple[int, ...], scale: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; `None` where it does not follow.

    Args:
        shape: of the values; matrices may be stacked.
        scale: of the scales: one, or a grid for each matrix.
        stated: what the config says. A checkpoint may store other tensors in other blocks.

    >>> fp8_blocks((160, 160), (2, 2), None), fp8_blocks((64, 96), (64, 3), (128, 128))
    ((128, 128), (1, 32))
    >>> fp8_blocks((160, 160), (2, 2), (64, 64)) is None
    True
    """
    if torch.Size(scale).numel() == 1:
        return (max(shape[-2:-1], default=1), max(shape[-1:], default=1))
    if (
        len(shape) < 2
        or len(scale) != len(shape)
        or any(n not in (1, m) for n, m in zip(scale[:-2], shape, strict=False))
    ):
        return None
    tall = _block_length(shape[-2], scale[-2], stated, 0)
    wide = _block_length(shape[-1], scale[-1], stated, 1)
    return None if tall is None or wide is None else (tall, wide)


def _block_length(size: int, count: int, stated: tuple[int, int] | None, axis: int) -> int | None:
    """Length of the ``count`` blocks of an axis: as stated or the format's default, where that fits.

    Else an even division, if it gives what a format may have: all of the axis or a power of two.
    """
    length = (stated or _default_block())[axis]
    if -(-size // length) == count:
        return length
    even, rest = divmod(size, max(count, 1))
    return even if rest == 0 and (count == 1 or even.bit_count() == 1) else None


@cache
def _default_block() -> tuple[int, int]:
    rows, columns = FineGrainedFP8Config().weight_block_size
    return int(rows), int(columns)


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
