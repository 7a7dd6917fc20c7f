"""Evenly spaced levels, their scales, and codes of a few bits in bytes: shared by quantizers."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import UserError

# A dtype as wide as the bfloat16 numbers that come of one byte.
_WORD_DTYPES = {4: torch.int32, 2: torch.int64, 1: torch.complex128}
# Weights that are encoded at once: their working memory stays in the processor's cache.
CHUNK = 1 << 18
WORD_BITS = 32


def check_finite(weight: Float[Tensor, "R C"]) -> None:
    """Refuse a matrix with NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise UserError("a weight matrix holds NaN or infinity and cannot be stored in fewer bits")


def levels_of(x: Float[Tensor, "R G g"], scales: Float[Tensor, "R G"], half: float) -> Float[Tensor, "R G g"]:
    """For each weight the nearest of the levels from ``-half`` to ``half``, one apart; 0 has none."""
    steps = x / torch.where(scales > 0, scales, 1)[..., None]
    return steps.add_(half).round_().clamp_(0, 2 * half).sub_(half)


def best_scales(
    x: Float[Tensor, "R G g"], levels: Float[Tensor, "R G g"], importance: Float[Tensor, "G g"] | None = None
) -> tuple[Float[Tensor, "R G"], Float[Tensor, "R G"]]:
    """The scales with which levels are nearest to the weights, and the squared error they take off.

    ``importance`` is what a column's squared error counts; 1 if not given, 0 where there is no column.
    """
    weighed = levels if importance is None else levels * importance
    xl, ll = (x * weighed).sum(-1), (levels * weighed).sum(-1)
    return xl / ll, xl.square() / ll


def scale_groups(
    levels: Float[Tensor, "R C"], scales: Float[Tensor, "R G"], group: int
) -> Float[Tensor, "R C"]:
    """Levels times the scale of their group, in place and in their dtype; the last group may be short."""
    rows, cols = levels.shape
    scales = scales.to(levels.dtype)
    if cols % group:
        return levels.mul_(scales.repeat_interleave(group, dim=1)[:, :cols])
    return levels.view(rows, -1, group).mul_(scales[..., None]).view(rows, cols)


def pack(codes: UInt8[Tensor, "R C"], bits: int) -> UInt8[Tensor, "R B"]:
    """Codes of 1, 2, 4 or 8 bits, ``8 / bits`` to a byte, the first in the lowest bits.

    Each row starts a new byte; what is left of its last byte is zero.
    """
    per_byte = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[1] % per_byte)).view(codes.shape[0], -1, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def unpack(
    packed: UInt8[Tensor, "R B"], bits: int, cols: int, dtype: torch.dtype, shift: float = 0.0
) -> Float[Tensor, "R C"]:
    """The codes of `pack`, each less ``shift``, as numbers of ``dtype`` in new memory.

    ``shift`` and the shifted codes must be numbers that bfloat16 holds exactly.
    """
    if bits == 8:
        return packed[:, :cols].to(dtype).sub_(shift)
    # A byte at a time through a table of the numbers in it is twice as fast as shifting and masking.
    words = _words(bits, shift).to(packed.device)
    numbers = words.index_select(0, packed.reshape(-1).to(torch.int32)).view(torch.bfloat16)
    return numbers.view(packed.shape[0], -1)[:, :cols].to(dtype)


def pack_words(codes: UInt8[Tensor, "R C"], bits: int) -> Int32[Tensor, "R W"]:
    """Codes one after the other, from the lowest bit of the first word on; the last is filled with zeros."""
    rows, cols = codes.shape
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = (codes[..., None] >> shifts & 1).view(rows, cols * bits)
    stream = F.pad(stream, (0, -stream.shape[1] % WORD_BITS)).view(rows, -1, 8)
    packed = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed.contiguous().view(torch.int32)


def unpack_words(words: Int32[Tensor, "R W"], bits: int, cols: int) -> UInt8[Tensor, "R C"]:
    """What `pack_words` was given."""
    packed = words.contiguous().view(torch.uint8)
    stream = (packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).view(len(words), -1)
    parts = stream[:, : cols * bits].view(len(words), cols, bits)
    return (parts << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def nested_planes(codes: UInt8[Tensor, "R C"], bits: int) -> dict[str, Tensor]:
    """The bits of codes of eight bits, by the narrowest width that reads them."""
    planes = {"codes_2": pack(codes >> 6, 2)}
    if bits > 2:
        planes["codes_4"] = pack(codes >> 4 & 3, 2)
    if bits > 4:
        low = F.pad(codes & 15, (0, -codes.shape[1] % 4))
        planes["codes_8"] = torch.stack([pack(low[:, first::2].contiguous(), 4) for first in (0, 1)])
    return planes


@cache
def _words(bits: int, shift: float) -> Tensor:
    """For each byte the bfloat16 numbers of its codes, as one word."""
    codes: Tensor = torch.arange(256)[:, None] >> torch.arange(0, 8, bits) & 2**bits - 1
    return (codes - shift).to(torch.bfloat16).view(_WORD_DTYPES[bits]).flatten()
