"""Weight matrices as the compiled kernels read them: in place, dense or as codes with scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mixtura.kernels.compiled import NUMBERS, native
from mixtura.methods._codebooks import codebook

_FORMATS: Final = {8: 2, 4: 3, 2: 4}
_NESTED_FORMATS: Final = {8: 5, 4: 6}
_TRELLIS_FORMAT: Final = 7
_LEAST_RATE, _MOST_RATE = 8, 48


@final
@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix for the compiled kernels.

    Attributes:
        rows: output features.
        cols: input features.
        bits: of a weight.
        record: the extension's record of where it lies.
        holds: the tensors that must stay.
        is_trellis: whether its codes are those of a trellis, which take longer to decode.
    """

    rows: int
    cols: int
    bits: float
    record: Any
    holds: tuple[Tensor, ...] = field(repr=False)
    is_trellis: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes that one multiplication reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.holds)


@final
class KeptMatrix:
    """A matrix that is made once, and anew where what it was made of changed.

    Copies and pickles of it are empty: their tensors lie elsewhere.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], Matrix] | None = None

    def get(
        self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], make: Callable[[], Matrix | None]
    ) -> Matrix | None:
        """What ``make`` gives for these tensors and sizes; the matrix holds the tensors."""
        made_of = (*sizes, *[(id(one), one.data_ptr(), one.shape) for one in tensors])
        kept = self._kept
        if kept is not None and kept[0] == made_of:
            return kept[1]
        matrix = make()
        self._kept = None if matrix is None else (made_of, matrix)
        return matrix

    def __reduce__(self) -> tuple[type[KeptMatrix], tuple[()]]:
        return KeptMatrix, ()


def dense_matrix(weight: Float[Tensor, "R C"]) -> Matrix | None:
    """A matrix of bfloat16 or float32 in place; None where its strides are not those of rows or columns."""
    if native() is None or weight.dtype not in NUMBERS or weight.device.type != "cpu" or not weight.numel():
        return None
    (rows, cols), size = weight.shape, weight.element_size()
    by_row = cols == 1 or weight.stride(1) == 1
    if not by_row and weight.stride(0) != 1:
        return None
    stride = weight.stride(0) if by_row else weight.stride(1)
    record = native().Matrix(  # type: ignore[union-attr]
        NUMBERS[weight.dtype], weight.data_ptr(), 0, rows, cols, stride * size, 0, 1, not by_row
    )
    return Matrix(rows, cols, 8 * size, record, (weight,))


def coded_matrix(
    codes: UInt8[Tensor, "R B"], scales: Float[Tensor, "R G"], *, cols: int, bits: int, group: int
) -> Matrix | None:
    """A matrix of codes of 8, 4 or 2 bits as ``round_to_nearest`` stores it, in place.

    Args:
        codes: ``8 / bits`` to a byte, the first in the lowest bits; a code stands for the level
            ``code - (2 ** bits - 1) / 2``.
        scales: in bfloat16, one for every ``group`` neighbouring levels of a row.
        cols: input features.
        bits: of a code.
        group: weights that share a scale; at least ``cols`` for one scale for each row.
    """
    fits = codes.is_contiguous() and scales.is_contiguous() and scales.dtype == torch.bfloat16
    if (
        native() is None
        or bits not in _FORMATS
        or not fits
        or codes.device.type != "cpu"
        or not codes.numel()
    ):
        return None
    (rows, row_bytes), row_scales = codes.shape, scales.shape[1]
    record = native().Matrix(  # type: ignore[union-attr]
        _FORMATS[bits], codes.data_ptr(), scales.data_ptr(), rows, cols, row_bytes, row_scales, group, False
    )
    return Matrix(rows, cols, bits, record, (codes, scales))


def nested_matrix(
    planes: Sequence[UInt8[Tensor, "..."]], scales: Float[Tensor, "R G"], *, cols: int, bits: int, group: int
) -> Matrix | None:
    """A matrix of codes of 8, 4 or 2 bits as the quantizer ``nested`` stores it, in place.

    Args:
        planes: the bits that this width reads: the upper two of each code ``[R, B]`` with B = ceil(cols / 4),
            the next two ``[R, B]``, the lower four ``[2, R, B]``.
        scales: of this width, in bfloat16, one for every ``group`` neighbouring levels of a row.
        cols: input features.
        bits: of a code as it is read.
        group: weights that share a scale; at least ``cols`` for one scale for each row.
    """
    upper, rest = planes[0], tuple(planes[1:])
    top = coded_matrix(upper, scales, cols=cols, bits=2, group=group)
    if top is None or bits == 2:
        return top
    if any(not plane.is_contiguous() or plane.device.type != "cpu" for plane in rest):
        return None
    rows, row_bytes = upper.shape
    lower = [plane.data_ptr() for each in rest for plane in each.view(-1, rows, row_bytes)]
    record = native().Matrix(  # type: ignore[union-attr]
        _NESTED_FORMATS[bits],
        upper.data_ptr(),
        scales.data_ptr(),
        rows,
        cols,
        row_bytes,
        scales.shape[1],
        group,
        False,
        lower,
    )
    return Matrix(rows, cols, bits, record, (*planes, scales))


def trellis_matrix(
    codes: UInt8[Tensor, "B C rate"], scales: Float[Tensor, "B G 64"], *, rows: int, cols: int, group: int
) -> Matrix | None:
    """A matrix of codes as the quantizer ``trellis`` stores it, in place.

    Args:
        codes: a ring of bits for each strip of 64 rows and each column.
        scales: in bfloat16, one for every ``group`` neighbouring columns of a row.
        rows: output features; the last strip may have more.
        cols: input features.
        group: columns that share a scale; at least ``cols`` for one scale for each row.
    """
    fits = codes.is_contiguous() and scales.is_contiguous() and scales.dtype == torch.bfloat16
    rate = codes.shape[-1]
    known = _LEAST_RATE <= rate <= _MOST_RATE and codes.device.type == "cpu" and codes.numel() > 0
    if native() is None or not fits or not known:
        return None
    table = codebook(rate)[0]
    record = native().Matrix(  # type: ignore[union-attr]
        _TRELLIS_FORMAT,
        codes.data_ptr(),
        scales.data_ptr(),
        rows,
        cols,
        cols * rate,
        scales.shape[1] * scales.shape[2],
        group,
        False,
        table=table.data_ptr(),
        rate=rate,
    )
    return Matrix(rows, cols, rate / 8, record, (codes, scales, table), is_trellis=True)
