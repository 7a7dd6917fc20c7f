"""MC-SMoE's second step: a product of two thin matrices, and the few rows that it fits worst."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.errors import check_range
from mixtura.methods.quantizers import Encoded, Quantizer
from mixtura.methods.quantizers._feedback import check_moments
from mixtura.methods.quantizers._shared import check_finite

METHOD = {
    "paper": 120,
    "title": "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
}

# Bits of a number, and of the place of a row.
_NUMBER_BITS, _PLACE_BITS = 16, 32


@final
class LowRankSparse(Quantizer):
    """Low rank plus sparse (LoSparse): a matrix as two thin factors and a few whole rows of the rest.

    The factors are those of least squared error (a singular value decomposition). Of what they leave, the
    rows that lose most are kept, so that these outputs are right; then the factors are fitted once more, to
    the other rows alone. With ``moments`` error is what outputs lose. All numbers are bfloat16: ``bits`` says
    how many there are, as bits of a weight of the whole matrix.

    It is the step after ``m_smoe``, whose merged experts are said to be of lower rank than others:
    ``mixtura compress --merge m_smoe --keep 0.5 --quantize low_rank_sparse --bits 6.4``. Experts of full rank
    lose far more by this than by rounding to as many bits. A layer multiplies the factors out before it runs.

    Shapes:
        ``[R, C]`` to ``left [R, k]``, ``right [k, C]``, ``rows [n, C]`` and ``places [n]`` (int32), with
        ``k = floor(bits / 16 * rank_share * R * C / (R + C))`` and as many rows as there is room for.

    Raises:
        SettingError: ``bits`` is not in [0.5, 16], or ``rank_share`` not in [0, 1].
        UserError: the matrix holds NaN or infinity, or its moments do.

    Example:
        >>> weight = torch.outer(torch.arange(1.0, 17), torch.arange(1.0, 17))
        >>> weight[3] = torch.ones(16)
        >>> encoded = LowRankSparse(bits=6).encode(weight)
        >>> 3 in encoded.tensors["places"], LowRankSparse(bits=6).decode(encoded)[3, :3].tolist()
        (True, [1.0, 1.0, 1.0])

    Differences from the paper:
        Nothing is trained: rows are chosen by their squared error, with moments that of the outputs, where
        the paper's code goes by weights times gradients while it fine-tunes with a teacher; that the factors
        are fitted again to the other rows, and moments, are our own. Its defaults are kept: factors of 15 %
        of the matrix's numbers and a quarter of the rows. All experts are treated alike, merged or not.

    Reference:
        Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy (paper 120), whose
        code was read; it takes the decomposition from LoSparse: Structured Compression of Large Language
        Models based on Low-Rank and Sparse Approximation (arXiv 2306.11222; not in the collection).
    """

    def __init__(self, *, bits: float = 6.4, rank_share: float = 0.375) -> None:
        check_range("LowRankSparse", "bits", bits, 0.5, _NUMBER_BITS)
        check_range("LowRankSparse", "rank_share", rank_share, 0, 1)
        self.bits = bits
        self.rank_share = rank_share

    @torch.no_grad()
    def encode(self, weight: Float[Tensor, "R C"], moments: Float[Tensor, "C C"] | None = None) -> Encoded:
        check_finite(weight)
        check_moments(moments)
        rows, cols = weight.shape
        rank, num_rows = self._sizes(rows, cols)
        whole = weight.float()
        # Products of three must neither vanish nor overflow.
        unit = float(torch.exp2(whole.abs().max().log2().floor())) if bool(whole.any()) else 1.0
        whole = whole / unit
        inputs = torch.eye(cols) if moments is None or not bool(moments.any()) else moments.float()
        inputs = inputs / inputs.diagonal().max()
        left, right = _factors(whole, inputs, rank)
        off = whole - left @ right
        lost = ((off @ inputs) * off).sum(1)
        places = torch.sort(torch.argsort(lost, descending=True, stable=True)[:num_rows]).values
        others = whole.clone()
        others[places] = 0
        left, right = (one.to(torch.bfloat16) for one in _factors(others, inputs, rank))
        kept = whole[places] - left[places].float() @ right.float()
        tensors = {
            "left": left.contiguous(),
            "right": (right * unit).contiguous(),
            "rows": (kept * unit).to(torch.bfloat16),
            "places": places.to(torch.int32),
        }
        return Encoded(tensors, {"rows": rows, "cols": cols})

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R C"]:
        parts = encoded.tensors
        back = parts["left"].float() @ parts["right"].float()
        back[parts["places"].long()] += parts["rows"].float()
        return back.to(dtype)

    def num_bytes(self, rows: int, cols: int) -> int:
        rank, num_rows = self._sizes(rows, cols)
        return (rank * (rows + cols) * _NUMBER_BITS + num_rows * (cols * _NUMBER_BITS + _PLACE_BITS)) // 8

    def _sizes(self, rows: int, cols: int) -> tuple[int, int]:
        """The rank of the factors, and how many rows are kept."""
        room = int(self.bits * rows * cols)
        rank = int(self.rank_share * room) // ((rows + cols) * _NUMBER_BITS)
        rank = min(rank, rows, cols)
        left = room - rank * (rows + cols) * _NUMBER_BITS
        return rank, min(left // (cols * _NUMBER_BITS + _PLACE_BITS), rows)


def _factors(
    weight: Float[Tensor, "R C"], inputs: Float[Tensor, "C C"], rank: int
) -> tuple[Float[Tensor, "R k"], Float[Tensor, "k C"]]:
    """The product of this rank whose outputs are nearest: onto the outputs' main directions."""
    products = weight @ inputs @ weight.T
    _, directions = torch.linalg.eigh((products + products.T) / 2)
    left = directions[:, len(weight) - rank :].flip(1)
    return left, left.T @ weight
