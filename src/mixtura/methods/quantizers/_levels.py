"""Evenly spaced levels with a scale for each group: how they are stored, and scales that suit weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError, check_range
from mixtura.methods.quantizers import Encoded
from mixtura.methods.quantizers._shared import best_scales, levels_of, pack, scale_groups, unpack

# Shares of a group's largest weight tried as the end of the range.
RANGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def searched(
    x: Float[Tensor, "R G g"],
    half: float,
    shares: Sequence[float],
    importance: Float[Tensor, "G g"] | None = None,
) -> Float[Tensor, "R G"]:
    """Of some shares of each group's range the scale that leaves the least squared error; else the whole.

    Args:
        x: weights in groups.
        half: the highest level.
        shares: of a group's largest weight, tried as the end of the range.
        importance: of a column's squared error.
    """
    widest = x.abs().amax(-1) / half
    scales, gains = widest, torch.zeros_like(widest)
    for share in shares:
        best, gain = best_scales(x, levels_of(x, widest * share, half), importance)
        scales = torch.where(gain > gains, best, scales)
        gains = torch.maximum(gains, gain)
    return scales


@final
@dataclass(frozen=True, slots=True)
class EvenLevels:
    """``2 ** bits`` levels around zero, half a step to either side of it; a scale for each group.

    With 8 bits a group is a row. Codes of 4 or 2 bits share a byte, the first in the lowest bits; scales are
    bfloat16.

    Args:
        owner: what errors call the quantizer.
        bits: 8, 4 or 2.
        group_size: neighbouring weights of a row that share a scale, with fewer bits than 8.

    Raises:
        SettingError: a setting is out of range.
    """

    owner: str
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 2):
            raise SettingError(f"bits of {self.owner} must be 8, 4 or 2, got {self.bits!r}")
        check_range(self.owner, "group_size", self.group_size, 1, 65536)

    @property
    def half(self) -> float:
        """The highest level."""
        return ((1 << self.bits) - 1) / 2

    def group(self, cols: int) -> int:
        """Weights that share a scale in rows of so many."""
        return cols if self.bits == 8 else min(self.group_size, cols)

    def num_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix."""
        return rows * (-(-cols * self.bits // 8) + 2 * -(-cols // self.group(cols)))

    def scales(
        self, weight: Float[Tensor, "R C"], importance: Float[Tensor, " C"] | None = None
    ) -> Float[Tensor, "R G"]:
        """Per group, of a few ranges the scale that leaves the least squared error (8 bits: the whole range).

        Args:
            weight: in float32.
            importance: of a column's squared error; all are alike if not given.
        """
        (rows, cols), group = weight.shape, self.group(weight.shape[1])
        x = F.pad(weight, (0, -cols % group)).view(rows, -1, group)
        counts = torch.ones(cols, device=x.device) if importance is None else importance
        counts = F.pad(counts, (0, -cols % group)).view(x.shape[1:])
        return searched(x, self.half, RANGES if self.bits < 8 else RANGES[:1], counts)

    def encoded(self, codes: UInt8[Tensor, "R C"], scales: Float[Tensor, "R G"]) -> Encoded:
        """A matrix of codes and scales."""
        rows, cols = codes.shape
        tensors = {"codes": pack(codes, self.bits), "scales": scales.to(torch.bfloat16).contiguous()}
        return Encoded(tensors, {"rows": rows, "cols": cols})

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Float[Tensor, "R C"]:
        """The matrix back."""
        cols = encoded.meta["cols"]
        # In bfloat16 levels are exact and a product is rounded once; float16 cannot hold the scales.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        levels = unpack(encoded.tensors["codes"], self.bits, cols, exact, self.half)
        return scale_groups(levels, encoded.tensors["scales"], self.group(cols)).to(dtype)
