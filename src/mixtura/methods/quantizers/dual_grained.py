"""DGQ: groups of few bits whose scales are whole numbers, so that a row is INT8 with one scale."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mixtura.errors import SettingError, check_range
from mixtura.methods.quantizers import Encoded, Quantizer
from mixtura.methods.quantizers._shared import check_finite, pack, unpack

METHOD = {
    "paper": 181,
    "title": "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM",
}

# What a weight is before the scale of its row: a whole number of so many at most.
_MOST = 127
# Shares of a group's range, and of the largest scale of a row, that are tried.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
_STEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@final
class DualGrained(Quantizer):
    """Two scales, dual-grained (W4A8's weights): INT4 in groups, INT8 in rows, found by two searches.

    A weight is ``row scale * group scale * (code - zero point)``. Group scales are whole numbers, such that
    their products with codes fit INT8: a kernel makes INT8 of the codes, multiplies with INT8 activations
    along the whole row, and scales the sum once. First every group gets the scale and zero point
    of least squared error, of a few ranges; then every row its scale, of a few, to which group scales and
    codes are rounded. With ``moments`` the second search goes by what outputs lose.

    There is no compiled kernel for these codes: a layer decodes an expert before it multiplies.

    Shapes:
        ``[R, C]`` to ``codes [R, ceil(C * bits / 8)]``, ``zeros`` and ``steps [R, ceil(C / group_size)]`` of
        bytes and ``scales [R, 1]``; the last group may be short.

    Raises:
        SettingError: ``bits`` is not 4 or 2, or ``group_size`` not in [1, 65536].
        UserError: the matrix holds NaN or infinity.

    Example:
        >>> weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        >>> encoded = DualGrained(bits=2).encode(weight)
        >>> encoded.tensors["codes"].tolist(), encoded.tensors["steps"].tolist()
        ([[228]], [[42]])

    Differences from the paper:
        Weights alone: activations stay as they are, and there is neither their percentile clipping (a
        smoothing that is folded into the weights) nor the INT8 product, for which no kernel is here. Ranges
        and steps of the two searches are our own, and so is that all of a row's products judge the
        second.
        Zero points take a byte each.

    Reference:
        Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM (Zhang, Fei, Wu, He, Lou and
        Zhou, 2023, arXiv 2310.04836; paper 181). Its abstract and a description of the searches were read.
    """

    def __init__(self, *, bits: int = 4, group_size: int = 64) -> None:
        if bits not in (4, 2):
            raise SettingError(f"bits of DualGrained must be 4 or 2, got {bits!r}")
        check_range("DualGrained", "group_size", group_size, 1, 65536)
        self.bits = bits
        self.group_size = group_size

    @torch.no_grad()
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        check_finite(weight)
        (rows, cols), group = weight.shape, min(self.group_size, weight.shape[1])
        whole = weight.float()
        filled = torch.arange(-(-cols // group) * group) < cols
        x, there = F.pad(whole, (0, -cols % group)).view(rows, -1, group), filled.view(-1, group)
        scales, zeros = self._fine(x, there)
        # Group scales that are whole: the largest is the largest that leaves every product within a byte.
        reach = torch.maximum(zeros, self._top - zeros)
        widest = (scales * reach).amax(1, keepdim=True) / _MOST
        best: dict[str, Tensor] = {}
        lost = torch.full((rows,), torch.inf)
        for share in _STEPS:
            row = (widest * share).to(torch.bfloat16).float()
            steps = (scales / torch.where(row > 0, row, 1)).round_()
            steps = torch.minimum(steps, (_MOST / reach).floor()).clamp_(min=1)
            codes = self._codes(x, row * steps, zeros)
            off = ((codes - zeros[..., None]) * (row * steps)[..., None] - x).view(rows, -1)[:, :cols]
            now = (off.square() if moments is None else (off @ moments.float()) * off).sum(1)
            better = now < lost
            lost = torch.where(better, now, lost)
            for name, value in (("codes", codes.view(rows, -1)[:, :cols]), ("steps", steps), ("scales", row)):
                best[name] = torch.where(better[:, None], value, best.get(name, value))
        tensors = {
            "codes": pack(best["codes"].to(torch.uint8), self.bits),
            "zeros": zeros.to(torch.uint8),
            "steps": best["steps"].to(torch.uint8),
            "scales": best["scales"].to(torch.bfloat16),
        }
        return Encoded(tensors, {"rows": rows, "cols": cols})

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        cols, parts = encoded.meta["cols"], encoded.tensors
        group = min(self.group_size, cols)
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        zeros, steps = (
            parts[name].to(exact).repeat_interleave(group, dim=1)[:, :cols] for name in ("zeros", "steps")
        )
        # Whole numbers of 127 at most, which bfloat16 has exactly.
        whole = unpack(parts["codes"], self.bits, cols, exact).sub_(zeros).mul_(steps)
        return whole.mul_(parts["scales"].to(exact)).to(dtype)

    def num_bytes(self, rows: int, cols: int) -> int:
        return rows * (-(-cols * self.bits // 8) + 2 * -(-cols // min(self.group_size, cols)) + 2)

    @property
    def _top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    def _codes(self, x: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        steps = x / torch.where(scales > 0, scales, 1)[..., None]
        return (steps + zeros[..., None]).round_().clamp_(0, self._top)

    def _fine(self, x: Float[Tensor, "R G g"], there: Tensor) -> tuple[Tensor, Tensor]:
        """For each group the scale and zero point of least squared error, of a few ranges."""
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scales = zeros = torch.zeros_like(low)
        lost = torch.full_like(low, torch.inf)
        for share in _RANGES:
            now = (high - low) * share / self._top
            point = (-low * share / torch.where(now > 0, now, 1)).round_().clamp_(0, self._top)
            back = (self._codes(x, now, point) - point[..., None]) * now[..., None]
            off = ((back - x).square() * there).sum(-1)
            better = off < lost
            lost, scales = torch.where(better, off, lost), torch.where(better, now, scales)
            zeros = torch.where(better, point, zeros)
        return scales, zeros
