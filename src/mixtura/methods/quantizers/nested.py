"""Nested codes: one copy of a matrix that is read at 8, 4 or 2 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError, check_range
from mixtura.methods.quantizers import Encoded, Quantizer
from mixtura.methods.quantizers._shared import (
    CHUNK,
    best_scales,
    check_finite,
    levels_of,
    nested_planes,
    scale_groups,
    unpack,
)

METHOD = {
    "paper": 28,
    "title": "D^{2}MoE: Dual Routing and Dynamic Scheduling for Efficient On-Device MoE-based LLM Serving",
}
_WIDTHS = (8, 4, 2)
_HALF = 127.5


@final
class Nested(Quantizer):
    """Store one copy of a matrix whose codes can be read at 8, 4 or 2 bits, whichever an expert is worth.

    Weights of a group are rounded to 256 evenly spaced levels over its whole range. The upper four bits
    of a code are its 4-bit code and the upper two its 2-bit code. The bits lie apart: reading at 2
    bits touches a quarter of the codes' bytes, at 4 bits half. Each width has a scale of its own for
    each group, of least squared error given the codes, in bfloat16. Levels lie half a step beside zero,
    so that the code of a narrower width is the nearest one and not merely the one below.

    Shapes:
        ``[R, C]`` to ``codes_2 [R, B]`` (upper two bits, four weights to a byte, the first in the lowest
        bits, so B = ceil(C / 4)), ``codes_4 [R, B]`` (the next two), ``codes_8 [2, R, B]`` (the lower four;
        weights of even columns, then those of odd ones, two to a byte) and for each width
        ``scales [R, ceil(C / group_size)]``. With ``bits`` 4 or 2 what only wider ones read is left out.

    Raises:
        SettingError: ``bits`` is not 8, 4 or 2, or ``group_size`` not in [1, 65536].
        UserError: the matrix holds NaN or infinity.

    Example:
        >>> weight = torch.tensor([[-0.75, -0.25, 0.25, 0.75]])
        >>> encoded = Nested(group_size=4).encode(weight)
        >>> top = {name: encoded.tensors[name] for name in Nested().widths[2]}
        >>> top["codes_2"].tolist(), Nested().decode(Encoded(top, encoded.meta)).tolist()
        ([[228]], [[-0.75, -0.25, 0.25, 0.75]])

    Differences from the paper:
        The widths are 8, 4 and 2 and codes are rounded once, without training. Which expert is worth how
        many bits is not decided here: `mixtura.load` and `mixtura.set_bits` take it from the caller. A
        scale for each width costs half a bit a weight in the whole copy; on normal weights in groups of
        64 it takes the error at 2 bits from 39 to 37 % of the norm.

    Reference:
        D^{2}MoE: Dual Routing and Dynamic Scheduling for Efficient On-Device MoE-based LLM Serving
        (paper 28), for bits nested in each other for each expert; of the paper its abstract was read.
        Taking the upper bits of an integer code is the slicing of Matryoshka Quantization.
    """

    def __init__(self, *, bits: int = 8, group_size: int = 64) -> None:
        if bits not in _WIDTHS:
            raise SettingError(f"bits of Nested must be 8, 4 or 2, got {bits!r}")
        check_range("Nested", "group_size", group_size, 1, 65536)
        self.bits = bits
        self.group_size = group_size

    @property
    def form(self) -> str:
        return "nested"

    @property
    def widths(self) -> Mapping[int, tuple[str, ...]]:
        planes = {2: ("codes_2",), 4: ("codes_2", "codes_4"), 8: ("codes_2", "codes_4", "codes_8")}
        return {width: (*planes[width], f"scales_{width}") for width in _WIDTHS if width <= self.bits}

    @torch.no_grad()
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        check_finite(weight)
        rows, cols = weight.shape
        made = [self._encode_rows(chunk.float()) for chunk in torch.split(weight, max(1, CHUNK // cols))]
        tensors = {name: torch.cat([one[name] for one in made], dim=-2) for name in made[0]}
        return Encoded(tensors, {"rows": rows, "cols": cols})

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        """The matrix back, at the widest of the widths whose tensors are there."""
        tensors, cols = encoded.tensors, encoded.meta["cols"]
        width = next(width for width in _WIDTHS if f"scales_{width}" in tensors)
        # Levels are exact in bfloat16, and their product with a scale is rounded once.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        levels = unpack(tensors["codes_2"], 2, cols, exact, 1.5)
        if width > 2:
            levels = levels.mul_(4).add_(unpack(tensors["codes_4"], 2, cols, exact, 1.5))
        if width > 4:
            levels.mul_(16)
            for first, plane in enumerate(tensors["codes_8"]):
                own = levels[:, first::2]
                own.add_(unpack(plane, 4, own.shape[1], exact, 7.5))
        return scale_groups(levels, tensors[f"scales_{width}"], min(self.group_size, cols)).to(dtype)

    def num_bytes(self, rows: int, cols: int) -> int:
        planes = {2: 1, 4: 2, 8: 4}[self.bits]
        scales = 2 * len(self.widths) * -(-cols // min(self.group_size, cols))
        return rows * (planes * -(-cols // 4) + scales)

    def _encode_rows(self, weight: Float[Tensor, "R C"]) -> dict[str, Tensor]:
        (rows, cols), group = weight.shape, min(self.group_size, weight.shape[1])
        x = F.pad(weight, (0, -cols % group)).view(rows, -1, group)
        finest = (x.abs().amax(-1) / _HALF).to(torch.bfloat16)
        codes = levels_of(x, finest.float(), _HALF).add_(_HALF).to(torch.uint8)
        there = torch.arange(x.shape[1] * group, device=x.device).view(x.shape[1:]) < cols
        kept = nested_planes(codes.view(rows, -1)[:, :cols], self.bits)
        for width in self.widths:
            coarse = (codes >> (8 - width)).float().sub_((2**width - 1) / 2).mul_(there)
            kept[f"scales_{width}"] = finest if width == 8 else best_scales(x, coarse)[0].to(torch.bfloat16)
        return kept
