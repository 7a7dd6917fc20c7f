"""FineQuant: groups of weights as small as the spread of each row asks for, and no smaller."""

from __future__ import annotations

import heapq
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError, check_range
from mixtura.methods.quantizers import Encoded, Quantizer
from mixtura.methods.quantizers._granularity import mean_range, places
from mixtura.methods.quantizers._levels import RANGES, searched
from mixtura.methods.quantizers._shared import check_finite, levels_of, pack, unpack

METHOD = {
    "paper": 177,
    "title": "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs",
}

# Groups are not made smaller than so many weights.
_SMALLEST = 8


@final
class FineQuant(Quantizer):
    """Adaptive group sizes (granularity) for INT8 and INT4: each row of a matrix has groups of its own size.

    Every row begins as one group. Groups of a row are halved as long as that makes their ranges smaller by
    more than ``ratio``, those rows first whose ranges shrink most: rows with outliers come to have many
    scales, calm rows few. There are as many scales in all as groups of ``group_size`` would have everywhere.
    Only weights are looked at, no text. A group's levels are evenly spaced, half a step beside zero; its
    scale is the one of least squared error among a few ranges (8 bits: the whole range), in bfloat16.

    There is no compiled kernel for these codes: a layer decodes an expert before it multiplies.

    Shapes:
        ``[R, C]`` to ``codes [R, ceil(C * bits / 8)]``, ``halvings [R]``, a byte each, and
        ``scales [R * ceil(C / group_size)]``: those of the first row, of the second, and zeros behind the
        last. A row with h halvings has groups of ``ceil(C / 2 ** h)`` weights; its last may be short.

    Raises:
        SettingError: ``bits`` is not 8, 4 or 2, ``group_size`` not in [1, 65536], or ``ratio`` less than 1.
        UserError: the matrix holds NaN or infinity.

    Example:
        >>> weight = torch.full((2, 64), 0.1)
        >>> weight[1, 0] = 5.0
        >>> encoded = FineQuant(group_size=16).encode(weight)
        >>> encoded.tensors["halvings"].tolist(), len(encoded.tensors["scales"])
        ([0, 2], 8)

    Differences from the paper:
        The paper chooses one size of groups for a whole matrix and lets the bytes follow; here every row has
        one and the bytes are given, so that a matrix takes what was predicted. Which ranges are compared, the
        default ratio and the smallest group are our own: of the paper its abstract and summaries of it were
        read. Scales are searched for, levels lie half a step beside zero, and the fused kernel for GPUs
        is not here. On normal weights, which have no outliers, 4 bits in groups of 64 leave a mean squared
        error of 0.0094 where groups of one size leave 0.0088.

    Reference:
        FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs (Kim, Henry, Fahim
        and Awadalla, 2023, arXiv 2308.09723; paper 177).
    """

    def __init__(self, *, bits: int = 4, group_size: int = 64, ratio: float = 1.05) -> None:
        if bits not in (8, 4, 2):
            raise SettingError(f"bits of FineQuant must be 8, 4 or 2, got {bits!r}")
        check_range("FineQuant", "group_size", group_size, 1, 65536)
        check_range("FineQuant", "ratio", ratio, 1, 1e6)
        self.bits = bits
        self.group_size = group_size
        self.ratio = ratio

    @torch.no_grad()
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        check_finite(weight)
        (rows, cols), whole = weight.shape, weight.float()
        halvings = self._halvings(whole)
        codes = torch.empty(rows, cols, dtype=torch.uint8)
        scales = torch.zeros(rows * -(-cols // min(self.group_size, cols)), dtype=torch.bfloat16)
        where = places(halvings, cols)
        for halving in halvings.unique().tolist():
            own = halvings == halving
            size = -(-cols // 2**halving)
            x = F.pad(whole[own], (0, -cols % size)).view(int(own.sum()), -1, size)
            found = searched(x, self._half, RANGES if self.bits < 8 else ()).to(torch.bfloat16)
            levels = levels_of(x, found.float(), self._half).add_(self._half)
            codes[own] = levels.to(torch.uint8).view(len(x), -1)[:, :cols]
            scales[where[own][:, ::size].flatten()] = found.flatten()
        tensors = {"codes": pack(codes, self.bits), "halvings": halvings.to(torch.uint8), "scales": scales}
        return Encoded(tensors, {"rows": rows, "cols": cols})

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        cols, parts = encoded.meta["cols"], encoded.tensors
        # In bfloat16 levels are exact and a product is rounded once; float16 cannot hold the scales.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        levels = unpack(parts["codes"], self.bits, cols, exact, self._half)
        scales = parts["scales"][places(parts["halvings"].long(), cols)]
        return levels.mul_(scales.to(exact)).to(dtype)

    def num_bytes(self, rows: int, cols: int) -> int:
        return rows * (-(-cols * self.bits // 8) + 1 + 2 * -(-cols // min(self.group_size, cols)))

    @property
    def _half(self) -> float:
        """The highest level."""
        return ((1 << self.bits) - 1) / 2

    def _halvings(self, weight: Float[Tensor, "R C"]) -> Int[Tensor, " R"]:
        """How often the groups of each row are halved, as long as there are scales left."""
        rows, cols = weight.shape
        sizes = [cols]
        while sizes[-1] > _SMALLEST:
            sizes.append(-(-cols // 2 ** len(sizes)))
        ranges = torch.stack([mean_range(weight, size) for size in sizes])
        # Where a row is zero from end to end, nothing shrinks.
        shrinks = torch.where(ranges[1:] > 0, ranges[:-1] / ranges[1:], 1.0).T.tolist()
        left = rows * (-(-cols // min(self.group_size, cols)) - 1)
        found = [0] * rows
        waiting = [(-own[0], row) for row, own in enumerate(shrinks) if own and own[0] > self.ratio]
        heapq.heapify(waiting)
        while waiting and left > 0:
            _, row = heapq.heappop(waiting)
            here, there = (-(-cols // sizes[found[row] + more]) for more in (0, 1))
            if there - here > left:
                continue
            left -= there - here
            found[row] += 1
            if found[row] < len(sizes) - 1 and shrinks[row][found[row]] > self.ratio:
                heapq.heappush(waiting, (-shrinks[row][found[row]], row))
        return torch.tensor(found)
